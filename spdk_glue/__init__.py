"""The NVMe layer: command records, queue pairs, transports, and the controller side's dispatch."""
