"""What moves the bytes of NVMe/TCP: C, and typed modules over it."""
