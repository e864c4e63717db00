"""The bytes of NVMe/TCP in C: whole PDUs in, batches of PDUs out, digests."""
