"""Prefix reuse: a prompt that begins with tokens whose keys and values are stored takes those."""
