"""Many drives on NVMe/TCP behind many hosts: what network, hosts and people have to bear.

Each host (GPUs, memory) has a share of the drives to itself, as one kvfs store spreads a sequence's KV heads
over its drives; hosts share nothing but the network, and decode different sequences. So one host is simulated,
and its traffic counted again as packets on a network.
"""

from dataclasses import asdict, dataclass

from machine_model.language_model import LanguageModel
from machine_model.machine import Machine
from machine_model.quantities import BadMachine
from machine_model.simulation import simulate
from machine_model.workload import Workload

# On the wire beside the data of a command and its answer: two capsules and headers of a PDU each, in TCP
# segments of an Ethernet of 9,000 bytes (NVMe/TCP transport specification 1.0, sections 3.6.2.2 to 3.6.2.12).
COMMAND_BYTES = 72 + 24 + 24 + 24  # capsule of command, C2H data, capsule of response, rounded up to headers
SEGMENT_BYTES, SEGMENT_HEADERS = 8948, 90  # TCP payload of 9,000; Ethernet with gap, IPv4, TCP with timestamps
FAILURES_A_YEAR = 0.01  # of a drive: Backblaze's SSDs, 2018 to 2023: 0.9 %
DAYS = 365.25


@dataclass(frozen=True)
class Fleet:
    """tokens_per_second: of all hosts; the rest per host but for what says otherwise.

    decode_network, prefill_network: bytes/s on the wire, both directions, while it does that alone
    commands: of attention, a second
    drive_network: bytes/s of one drive while decoding
    stored_tokens: of K and V, that all drives have room for
    failures_a_week: of all drives; recompute_seconds: what one full drive held, by prefill on one host
    """

    num_drives: int
    drives_per_host: int
    num_hosts: int
    system: str
    tokens_per_second: float
    host_tokens_per_second: float
    bottleneck: str
    decode_network: float
    prefill_network: float
    commands: float
    drive_network: float
    stored_tokens: float
    failures_a_week: float
    recompute_seconds: float

    def as_dict(self) -> dict:
        return asdict(self)


def fleet(
    machine: Machine, model: LanguageModel, system: str, work: Workload, num_drives: int, drives_per_host: int
) -> Fleet:
    """Raises BadMachine where a host's share does not fit, or there are fewer drives than a host has."""
    if not 1 <= drives_per_host <= num_drives:
        raise BadMachine(f"drives_per_host is 1 to {num_drives:,}, not {drives_per_host}")
    result = simulate(machine, model, system, work, drives_per_host)
    if not result.fits:
        raise BadMachine(f"{system} on {machine.name} with {drives_per_host} drives: {result.why_not}")
    geometry = model.geometry
    steps = result.decode_tokens_per_second / work.batch
    commands = steps * geometry.num_layers * drives_per_host
    payload = result.bytes.link_per_token * result.decode_tokens_per_second
    num_hosts = num_drives // drives_per_host
    prefilled = work.batch * work.input_tokens / result.prefill_seconds
    stored = machine.drive.capacity_bytes / geometry.token_bytes
    return Fleet(
        num_drives,
        drives_per_host,
        num_hosts,
        system,
        result.tokens_per_second * num_hosts,
        result.tokens_per_second,
        result.bottleneck,
        _on_wire(payload, commands),
        _on_wire(prefilled * geometry.token_bytes, prefilled * geometry.token_bytes / (1 << 20)),
        commands,
        _on_wire(payload / drives_per_host, commands / drives_per_host),
        stored * num_drives,
        num_drives * FAILURES_A_YEAR * 7 / DAYS,
        stored / prefilled,
    )


def _on_wire(payload: float, commands: float) -> float:
    """Bytes a second, of so many of data in so many commands a second; writes are of a MiB each."""
    data = payload + commands * COMMAND_BYTES
    # each command has its own segments, both ways; what is longer than a segment has more
    segments = 2 * commands + data / SEGMENT_BYTES
    return data + segments * SEGMENT_HEADERS
