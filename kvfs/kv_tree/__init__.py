"""The KV cache as a tree of files."""
