"""kvfs and what it is made of: attention where K and V lie, over as many drives as there are.

In a layer the GPU projects, sends queries down, and waits for the answers of all drives and for the host, which
attends to the tail that is not on flash yet. A drive reads windows while it computes those before; a drive
without an accelerator sends them to the host's CPUs instead. Spills are written behind, and meet reads in the
drives' queues.
"""

from kvfs.engines.x_cache.share import share_of
from machine_model import layout_bytes
from machine_model.events import Task
from machine_model.flash_time import program_time, read_time
from machine_model.layout_bytes import UnitPages
from machine_model.situation import Situation
from machine_model.systems.system import (
    ATTENTION,
    DRIVES_LINK,
    GPU,
    Moved,
    Pass,
    System,
    accelerator,
    flash,
    no_room_on_drives,
)
from spdk_glue.vendor_command import Derive

WRITER = "host.writes"


class Dense(System):
    name = "kvfs-dense"
    words = "kvfs: all of K and V attended to on the drives"
    has_ftl = True
    derive: Derive | None = None
    writes_behind = True

    def unit_pages(self, at: Situation) -> UnitPages:
        """Of a KV head of a sequence, one layer."""
        return layout_bytes.dense_pages(at.geometry, at.flash_tokens, at.page_bytes)

    def x_share(self, at: Situation) -> float:
        """Of K and V, what is stored as X instead."""
        return 0.0

    # capacity and bytes

    def stored(self, at: Situation) -> float:
        """Bytes on flash of all sequences of at.context tokens."""
        token = layout_bytes.stored_token_bytes(at.geometry, at.page_bytes, self.derive)
        share = self.x_share(at)
        return at.work.batch * at.context * token * (1 - share + share * at.model.rho)

    def why_not(self, at: Situation) -> str | None:
        drive = at.machine.drive
        room = at.num_drives * drive.capacity_bytes * (1 - drive.spare_share)
        needed = self.stored(at.at(at.work.last_tokens))
        if needed > room:
            return no_room_on_drives(at, needed, room)
        if at.host_weights_bytes > at.machine.host.free_bytes:
            return f"{at.host_weights_bytes / 1e9:,.0f} GB of weights do not fit in host memory"
        return None

    def moved(self, at: Situation) -> Moved:
        layers, share = at.geometry.num_layers, self.x_share(at)
        read = at.units * self.unit_pages(at).total * at.page_bytes * (1 - share)
        x_bytes = at.layer_kv_bytes * share * at.model.rho
        link = sum(self._link_bytes(at))
        return Moved(
            layers * (read + x_bytes),
            layers * self._written(at),
            layers * (link + x_bytes + at.work.batch * at.page_token_bytes),
            self.stored(at),
        )

    def _written(self, at: Situation) -> float:
        """Bytes that the host writes to flash in a step, one layer; with derived data's share."""
        share = self.x_share(at)
        rows = at.work.batch * at.page_token_bytes
        extra = 0.0
        if self.derive is not None:
            extra = at.work.batch * layout_bytes.derived_token_bytes(at.geometry, self.derive, at.page_bytes)
            extra /= at.geometry.num_layers
        return rows * (1 - share + share * at.model.rho) + extra

    def _link_bytes(self, at: Situation) -> tuple[float, float]:
        """(to the drives, back) for the attention of one layer."""
        each = [
            layout_bytes.command_bytes(at.geometry, units * (1 - self.x_share(at)), at.flash_tokens)
            for units in at.drive_units
            if units
        ]
        return sum(one.submit for one in each), sum(one.answer for one in each)

    # a decode step

    def decode_layer(self, one: Pass) -> Task:
        at, sim = one.at, one.simulation
        projected = sim.task(GPU, at.projection_seconds, "gpu", [one.before, one.weights()])
        attended = self.attention(one, projected)
        end = sim.task(GPU, at.rest_seconds, "gpu", [attended])
        if self.writes_behind:
            self._spill(one, projected, self._written(at))
        return end

    def attention(self, one: Pass, projected: Task | None) -> Task:
        """From the queries to all drives' answers, merged with the tail's."""
        at, sim, links = one.at, one.simulation, one.at.machine.links
        down, up = self._link_bytes(at)
        written = projected if self.writes_behind else self._small_writes(one, projected)
        sent = sim.task(DRIVES_LINK, links.latency + down / links.drives, "link", [written])
        busy = [(drive, units) for drive, units in enumerate(at.drive_units) if units]
        answers = [self._command(one, drive, units, sent) for drive, units in busy]
        answers.append(self._tail(one, projected))
        if self.x_share(at):
            answers.append(self._recompute(one, projected))
        return sim.task(DRIVES_LINK, links.latency + up / links.drives, "link", answers)

    def _command(self, one: Pass, drive: int, units: int, sent: Task) -> Task:
        """A drive's attention over its units: the last window computed."""
        at, sim, what = one.at, one.simulation, one.at.machine.drive
        pages = self.unit_pages(at)
        attended = units * (1 - self.x_share(at)) * at.page_bytes
        ordered = read_time(what)
        dense = layout_bytes.dense_pages(at.geometry, at.flash_tokens, at.page_bytes).total
        scattered = read_time(what, min(1.0, pages.scattered / dense) if dense else 1.0)
        end = sim.task(None, what.command_seconds + ordered.first, "flash", [sent])
        for num_bytes, page in (
            (attended * pages.ordered, ordered.page),
            (attended * pages.scattered, scattered.page),
        ):
            # scattered pages are chosen by what the ordered ones, an index, gave
            if num_bytes:
                end = self._stream(one, drive, num_bytes, page, end)
        return end

    def _stream(self, one: Pass, drive: int, num_bytes: float, page_seconds: float, after: Task) -> Task:
        at, what = one.at, one.at.machine.drive
        stages = [(flash(drive), num_bytes / at.page_bytes * page_seconds, "flash")]
        if what.accelerator_bandwidth:
            stages.append((accelerator(drive), num_bytes / what.accelerator_bandwidth, "accelerator"))
        else:
            stages.append((DRIVES_LINK, num_bytes / at.machine.links.drives, "link"))
            stages.append((ATTENTION, num_bytes / at.machine.host.attention_bandwidth, "host"))
        return one.simulation.stream(stages, min(1.0, what.window_bytes / num_bytes), [after])

    def _tail(self, one: Pass, projected: Task | None) -> Task:
        """The host's attention to tokens that are not on flash yet."""
        at, host = one.at, one.at.machine.host
        num_bytes = at.work.batch * at.tail_tokens * at.model.layer_token_bytes * (1 - self.x_share(at))
        seconds = host.tail_seconds + num_bytes / host.attention_bandwidth
        return one.simulation.task(ATTENTION, seconds, "host", [projected])

    def _recompute(self, one: Pass, projected: Task | None) -> Task:
        """X from the drives to the GPU, which makes K and V of it and attends to them."""
        at, sim = one.at, one.simulation
        share, ordered = self.x_share(at), read_time(at.machine.drive)
        num_bytes = at.layer_kv_bytes * share * at.model.rho
        rows = at.work.batch * at.context * share
        heads = at.geometry.num_query_heads * at.geometry.head_dim
        flops = 2.0 * at.model.kv_weights * rows + 4.0 * rows * heads
        seconds = at.gpu_seconds(flops, 2 * num_bytes / at.model.rho) / at.num_drives
        part = num_bytes / at.num_drives
        arrived = [
            sim.stream(
                [
                    (flash(drive), part / at.page_bytes * ordered.page, "flash"),
                    (f"drive{drive}.link", part / at.machine.drive.link_bandwidth, "link"),
                    (DRIVES_LINK, part / at.machine.links.drives, "link"),
                    (GPU, seconds, "gpu"),
                ],
                min(1.0, at.machine.drive.window_bytes / part),
                [projected],
            )
            for drive in range(at.num_drives)
        ]
        return sim.task(None, 0.0, "gpu", arrived)

    def _spill(self, one: Pass, after: Task, num_bytes: float) -> None:
        """This step's part of what is written behind."""
        at, sim = one.at, one.simulation
        moved = sim.task(DRIVES_LINK, num_bytes / at.machine.links.drives, "write", [after])
        pages = num_bytes / at.page_bytes / at.num_drives
        for drive in range(at.num_drives):
            sim.task(flash(drive), pages * program_time(at.machine.drive).page, "write", [moved])

    def _small_writes(self, one: Pass, after: Task | None) -> Task:
        """Every head's new K and V, one write after the other, before anybody attends to them."""
        at, sim = one.at, one.simulation
        seconds = 2 * at.units * at.machine.drive.small_write_seconds
        return sim.task(WRITER, seconds, "write", [after])

    # prefill

    def prefill_layer(self, one: Pass) -> Task:
        """A layer's K and V are written while the next is computed."""
        at, sim = one.at, one.simulation
        computed = sim.task(GPU, at.prefill_gpu_seconds, "gpu", [one.before, one.weights()])
        num_bytes = at.work.input_tokens * self._written(at)
        self._spill(one, computed, num_bytes)
        return computed


class Immediate(Dense):
    name = "kvfs-immediate"
    words = "kvfs without delayed writeback: each token's K and V are written in small pieces before attention"
    writes_behind = False

    def _written(self, at: Situation) -> float:
        """A whole page for each head's K, and for its V."""
        return 2.0 * at.units * at.page_bytes

    def prefill_layer(self, one: Pass) -> Task:
        at = one.at
        computed = one.simulation.task(GPU, at.prefill_gpu_seconds, "gpu", [one.before, one.weights()])
        num_bytes = at.work.input_tokens * at.work.batch * at.page_token_bytes
        self._spill(one, computed, num_bytes)
        return computed


class Sketch(Dense):
    name = "kvfs-sketch"
    words = "kvfs: sealed tokens by sketches at a compression"
    derive = Derive.SKETCH
    is_sparse = True

    def unit_pages(self, at: Situation) -> UnitPages:
        return layout_bytes.sketched_pages(at.geometry, at.flash_tokens, at.page_bytes, at.work.compression)


class Sparf(Dense):
    name = "kvfs-sparf"
    words = "SparF as published, true to pages"
    derive = Derive.CHANNEL_MAJOR_KEYS
    is_sparse = True

    def unit_pages(self, at: Situation) -> UnitPages:
        return layout_bytes.sparf_pages(at.geometry, at.flash_tokens, at.page_bytes, at.work.compression)


class SparfIdeal(Sparf):
    name = "sparf-ideal"
    words = "SparF if flash were read by the element: 1/compression of the bytes"

    def unit_pages(self, at: Situation) -> UnitPages:
        return layout_bytes.sparf_ideal_pages(at.geometry, at.flash_tokens, at.page_bytes, at.work.compression)


class XCache(Dense):
    name = "kvfs-x-cache"
    words = "kvfs: a share of K and V kept as X, from which the GPU recomputes them"

    def x_share(self, at: Situation) -> float:
        """The workload's, or the formula's for the drives' true bandwidth."""
        if at.work.x_share is not None:
            return at.work.x_share
        drives = at.num_drives * at.page_bytes / read_time(at.machine.drive).page
        return share_of(at.model.rho, at.machine.links.drives, drives)


__all__ = ["Dense", "Immediate", "Sketch", "Sparf", "SparfIdeal", "XCache"]
