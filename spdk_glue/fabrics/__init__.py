"""NVMe over fabrics, TCP: the protocol of both sides as a core without I/O, and what moves its bytes."""
