"""NVMe commands through Linux in C: by io_uring, or by ioctl. See `api`, and `node` for the device's facts."""
