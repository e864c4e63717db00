"""What the RTL of a card's kernel and its driver share. See FORMAT.md."""

ID, VERSION = 0x4146564B, 2  # "KVFA"
NAME = "kvfs_attention"
ARGUMENTS = ("job", "keys", "values", "answer")  # buffers, in the order of XRT's arguments
FACTS = ("id", "version", "lanes", "rows", "max_beats", "block_tokens", "status", "cycles")  # words
BUS_ERROR = 1 << 8  # status: a response of the memory was not OKAY
RECORD_BITS = 192  # of a block, without its mask
