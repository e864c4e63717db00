"""A store over several drives: KV heads, then sequences, spread over them."""
