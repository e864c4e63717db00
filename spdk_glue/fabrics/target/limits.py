"""What a target grants each peer: sizes, numbers and times. Beyond them a peer is refused or let go."""

from dataclasses import dataclass

PAGE_BYTES = 4096  # what MDTS counts in


@dataclass(frozen=True)
class Limits:
    """Of one target.

    max_transfer_bytes: of one command; in_capsule_bytes: data that ride with a command; max_h2c_data_bytes: in
    one PDU; queue_entries: of a queue; max_io_queues: of one host's controller; buffer_bytes: data of commands
    under way, for each connection; max_tickets: attention commands of one controller; handshake_seconds: from
    the connection to Connect; authentication_seconds: from there to the last message; stall_seconds: a peer
    that neither takes what it is sent nor sends what it began.
    """

    max_transfer_bytes: int = 1 << 20
    in_capsule_bytes: int = 8192  # most attention descriptors, at one round trip less
    max_h2c_data_bytes: int = 128 << 10
    queue_entries: int = 128
    max_io_queues: int = 64
    buffer_bytes: int = 4 << 20
    max_connections: int = 256
    max_tickets: int = 64
    num_events: int = 4  # Asynchronous Event Requests outstanding
    num_background: int = 2  # long commands of one connection at once
    handshake_seconds: float = 5.0
    authentication_seconds: float = 30.0
    stall_seconds: float = 30.0
    discovery_idle_seconds: float = 120.0  # of a discovery controller without keep alive

    def __post_init__(self):
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} is more than zero, not {value}")
        if self.max_transfer_bytes & (self.max_transfer_bytes - 1) or self.max_transfer_bytes < PAGE_BYTES:
            raise ValueError(f"max_transfer_bytes is a power of two of pages, not {self.max_transfer_bytes}")
        if self.buffer_bytes < self.max_transfer_bytes:
            raise ValueError(f"buffer_bytes holds at least one transfer, not {self.buffer_bytes} bytes")
        if self.in_capsule_bytes % 16 or self.in_capsule_bytes > self.max_h2c_data_bytes:
            raise ValueError(f"in_capsule_bytes counts in 16 bytes, not {self.in_capsule_bytes}")
        if not 32 <= self.queue_entries <= 1024:
            raise ValueError(f"queue_entries is 32 to 1024, not {self.queue_entries}")
        if self.max_connections > 4096 or self.max_io_queues > 1024:
            raise ValueError("max_connections is at most 4096, max_io_queues 1024")

    @property
    def mdts(self) -> int:
        return (self.max_transfer_bytes // PAGE_BYTES).bit_length() - 1
