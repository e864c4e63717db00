"""X-cache: of some layers the inputs are stored instead of keys and values (INF2, arXiv:2502.09921)."""
