"""The host's side of NVMe/TCP: tables without I/O, and a controller and its queue pairs over sockets."""
