"""The mount: the store's trees as one file system, through FUSE."""
