"""Direct I/O in C: io_uring batches over scattered pages, and CRC32C. See `api`."""
