"""NVMe over fabrics: both sides of NVMe/TCP, as a core without I/O, and what moves its bytes."""
