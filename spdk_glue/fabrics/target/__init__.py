"""The target: what a host finds when it connects."""
