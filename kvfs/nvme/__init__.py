"""Administration of NVMe namespaces, a kvfs drive's or any other's: what they are, raw blocks, raw commands."""
