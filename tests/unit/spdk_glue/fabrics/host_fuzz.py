"""Fuzzing the host: a target that answers rightly, on a wire that does not keep what it carries.

Most rounds change the target's bytes: flips, cuts, repetitions, exchanged PDUs, invented fields. Every round
checks that no byte beside a command's memory is written, that what is sent is right, that every command ends.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from spdk_glue import command
from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.fabrics import pdu
from spdk_glue.fabrics.pdu import Framing, PduFlag, PduType
from spdk_glue.status import Status, encode

from .wire_host import GuardedMemory, WireHost

BLOCK = 512
MAX_BLOCKS = 40
NUM_COMMANDS = 6


@dataclass
class FuzzReport:
    pdus: int = 0
    finished: int = 0  # rounds in which nothing was found wrong
    faults: Counter = field(default_factory=Counter)


@dataclass
class _Command:
    cid: int
    is_read: bool
    memory: GuardedMemory
    content: np.ndarray  # that the drive has, or gets
    granted: int = 0
    received: bytes = b""


class _Target:
    """Answers with the PDUs of a target, a random part of a command's data in each."""

    def __init__(self, random: np.random.Generator, framing: Framing, commands: list[_Command]):
        self._random = random
        self._framing = framing
        self._commands = commands

    def answer_read(self, one: _Command) -> list[bytes]:
        found, offset, size = [], 0, one.content.nbytes
        ends_with_data = self._random.random() < 0.5
        while offset < size:
            length = min(size - offset, int(self._random.integers(1, size // 4 + 2)) * 4)
            is_last = offset + length == size
            flags = (PduFlag.LAST | (PduFlag.SUCCESS if ends_with_data else 0)) if is_last else 0
            header = pdu.data(PduType.C2H_DATA, one.cid, length, self._framing, offsets=offset, flags=flags)
            found.append(pdu.with_digests(header, one.content[offset : offset + length].tobytes()))
            offset += length
        return found if ends_with_data else [*found, self.response(one.cid)]

    def grant(self, one: _Command) -> bytes:
        """An R2T for some of what is left."""
        left = one.content.nbytes - one.granted
        length = min(left, int(self._random.integers(1, left + 1)))
        offset, one.granted = one.granted, one.granted + length
        return pdu.with_digests(pdu.r2t(one.cid, 1, offset, length, self._framing))

    def response(self, cid: int, status: int = 0) -> bytes:
        entry = np.zeros(1, COMPLETION_ENTRY)
        entry["cid"], entry["status"] = cid, encode(status)
        return pdu.with_digests(pdu.capsule_responses(entry, self._framing))


def _damage(random: np.random.Generator, pdus: list[bytes]) -> list[bytes]:
    kind = random.integers(0, 7)
    at = int(random.integers(0, len(pdus)))
    one = bytearray(pdus[at])
    if kind == 0:
        return pdus
    if kind == 1:  # a bit of a header
        one[int(random.integers(0, 24))] ^= 1 << int(random.integers(0, 8))
    elif kind == 2:  # a byte anywhere
        one[int(random.integers(0, len(one)))] ^= int(random.integers(1, 256))
    elif kind == 3:  # a field with an extreme value
        start = int(random.choice([0, 2, 3, 4, 8, 10, 12, 16, 20]))
        one[start : start + 4] = random.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\x18\0\0\0"])
    elif kind == 4:
        one = one[: int(random.integers(0, len(one)))]
    elif kind == 5:
        return [*pdus[:at], pdus[at], *pdus[at:]]
    else:
        other = int(random.integers(0, len(pdus)))
        pdus = list(pdus)
        pdus[at], pdus[other] = pdus[other], pdus[at]
        return pdus
    return [*pdus[:at], bytes(one), *pdus[at + 1 :]]


def _round(random: np.random.Generator, report: FuzzReport) -> None:
    digests = random.integers(0, 2, 2).astype(bool).tolist()
    host = WireHost(
        depth=NUM_COMMANDS,
        header_digest=digests[0],
        data_digest=digests[1],
        max_h2c_data_bytes=4096,
        in_capsule_bytes=1024,
    )
    to_host = Framing(False, *digests, alignment=int(random.choice([4, 32])))
    from_host = Framing(True, *digests, max_data_bytes=1 << 20)
    commands = []
    for cid in random.permutation(1000)[:NUM_COMMANDS].tolist():
        num_blocks = int(random.integers(1, MAX_BLOCKS))
        is_read = bool(random.random() < 0.6)
        content = random.integers(0, 256, num_blocks * BLOCK, np.uint8)
        memory = GuardedMemory(content.nbytes)
        if not is_read:
            memory.data[:] = content
        commands.append(_Command(cid, is_read, memory, content))
        builder = command.read if is_read else command.write
        assert host.start(builder(0, num_blocks), memory.data, cid) == 0
    target = _Target(random, to_host, commands)
    by_cid = {one.cid: one for one in commands}
    completed, is_whole, damage = {}, True, random.random() < 0.7
    while len(completed) < NUM_COMMANDS and is_whole:
        answers: list[list[bytes]] = []
        sent = host.output(int(random.integers(1, 10_000)))
        while sent:  # whatever the target did: what a host sends is right
            one, taken = pdu.take_pdu(sent, from_host)
            sent = sent[taken:]
            assert one.is_data_intact
            is_capsule = one.type == PduType.CAPSULE_COMMAND
            mine = by_cid[int(one.record["entry"]["cid"] if is_capsule else one.record["cid"])]
            if is_capsule and mine.is_read:
                answers.append(target.answer_read(mine))
                continue
            if not is_capsule:
                assert int(one.record["offset"]) == len(mine.received) or damage
            mine.received += one.data
            if len(mine.received) < mine.content.nbytes:
                wants_more = is_capsule or bool(one.record["flags"] & PduFlag.LAST)
                if wants_more and mine.granted == mine.content.nbytes:  # an R2T was changed on its way
                    answers.append([target.response(mine.cid, Status.DATA_TRANSFER_ERROR)])
                elif wants_more:
                    answers.append([target.grant(mine)])
            else:
                assert mine.received == mine.content.tobytes() or damage
                answers.append([target.response(mine.cid, int(random.choice([0, 0, 0x281])))])
        stream = []
        while answers:  # mixed, each command's in their order
            chosen = answers[int(random.integers(0, len(answers)))]
            stream.append(chosen.pop(0))
            answers = [each for each in answers if each]
        if not stream:
            break  # the damage swallowed an answer
        report.pdus += len(stream)
        if damage and random.random() < 0.5:
            stream = _damage(random, stream)
        is_whole = host.feed(b"".join(stream), int(random.integers(1, 5000)))
        for completion in host.completions():
            completed[int(completion["cid"])] = int(completion["status"])
    for one in commands:
        assert one.memory.is_intact(), "a byte beside a command's memory was written"
        if one.is_read:
            changed = one.memory.data != 0x5A
            right = one.memory.data == one.content
            assert damage or right[changed].all()
            is_done = completed.get(one.cid) == 0
            if is_done and (all(digests) or not damage):
                assert right.all(), "a success with wrong data"
        else:
            assert (one.memory.data == one.content).all(), "a Write's memory was written"
    if host.fault:
        report.faults[host.fault_text] += 1
    else:
        report.finished += 1
        assert damage or len(completed) == NUM_COMMANDS
    host.abort()
    for completion in host.completions():
        cid = int(completion["cid"])
        assert cid not in completed, "a command that ends twice"
        completed[cid] = int(completion["status"])
    assert len(completed) == NUM_COMMANDS, "a command without an end"


def fuzz(seed: int, num_rounds: int) -> FuzzReport:
    """Raises AssertionError with what went wrong."""
    report = FuzzReport()
    random = np.random.default_rng(seed)
    for _ in range(num_rounds):
        _round(random, report)
    return report
