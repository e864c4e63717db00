"""Keyed objects: a cache on the drive for whoever has bytes of his own, by keys of his own."""
