"""What kvfs is compared with: K and V in the GPU, in host memory, or on SSDs that only store."""

from dataclasses import replace

from machine_model.events import Task
from machine_model.situation import GPU_ROOM, Situation
from machine_model.systems.system import ATTENTION, GPU, GPU_LINK, Moved, Pass, System, no_room_on_drives

DISK, COPY, SWAP = "disk", "host.copy", "swap"


class Baseline(System):
    """A layer: weights, then the GPU's projections, then attention wherever it is, then the rest."""

    def decode_layer(self, one: Pass) -> Task:
        at, sim = one.at, one.simulation
        projected = sim.task(GPU, at.projection_seconds, "gpu", [one.before, one.weights()])
        attended = self.attention(one, projected)
        return sim.task(GPU, at.rest_seconds, "gpu", [attended])

    def attention(self, one: Pass, projected: Task) -> Task:
        raise NotImplementedError

    def stored(self, at: Situation) -> float:
        return float(at.kv_bytes)

    def prefill_layer(self, one: Pass) -> Task:
        """K and V leave the GPU while the next layer is computed."""
        at, sim = one.at, one.simulation
        computed = sim.task(GPU, at.prefill_gpu_seconds, "gpu", [one.before, one.weights()])
        self.store(one, at.work.input_tokens * at.work.batch * at.model.layer_token_bytes, computed)
        return computed

    def store(self, one: Pass, num_bytes: float, after: Task) -> None:
        """Brings new K and V to where they are kept, beside the next layer."""


class GpuResident(Baseline):
    name = "gpu-resident"
    words = "K and V in the GPU's memory, where they fit"
    needs_drive = False

    def why_not(self, at: Situation) -> str | None:
        gpu = at.machine.gpu
        room = GPU_ROOM * gpu.memory_bytes * gpu.count
        kv_bytes = at.at(at.work.last_tokens).kv_bytes
        needed = at.model.weights_bytes + kv_bytes
        if needed > room:
            return (
                f"{kv_bytes / 1e9:,.0f} GB of K and V and {at.model.weights_bytes / 1e9:,.0f} GB of weights,"
                f" room for {room / 1e9:,.0f} GB in the GPU"
            )
        return None

    def decode_layer(self, one: Pass) -> Task:
        at, sim = one.at, one.simulation
        flops = 4.0 * at.work.batch * at.context * at.geometry.num_query_heads * at.geometry.head_dim
        seconds = at.projection_seconds + at.gpu_seconds(flops, at.layer_kv_bytes) + at.rest_seconds
        return sim.task(GPU, seconds, "gpu", [one.before])

    def prefill_layer(self, one: Pass) -> Task:
        return one.simulation.task(GPU, one.at.prefill_gpu_seconds, "gpu", [one.before])

    def moved(self, at: Situation) -> Moved:
        return Moved(0.0, 0.0, 0.0, self.stored(at))


class FlexGenSsd(Baseline):
    name = "flexgen-ssd"
    words = "FlexGen, K and V in mapped files on SSDs"

    def why_not(self, at: Situation) -> str | None:
        drive = at.machine.drive
        room = at.num_drives * drive.capacity_bytes
        needed = at.at(at.work.last_tokens).kv_bytes
        if needed > room:
            return no_room_on_drives(at, needed, room)
        return None

    def _is_cached(self, at: Situation) -> bool:
        """The page cache keeps a file that is read in a circle whole, or nothing of it."""
        if not at.machine.software.flexgen_page_cache:
            return False
        return at.kv_bytes <= at.machine.host.free_bytes - at.host_weights_bytes

    def _disk_bandwidth(self, at: Situation) -> float:
        """What the engine reads at, or the drives and their link if these are slower."""
        drives = min(at.num_drives * at.machine.drive.link_bandwidth, at.machine.links.drives)
        return min(at.machine.software.flexgen_disk_bandwidth, drives)

    def attention(self, one: Pass, projected: Task) -> Task:
        at, sim, software = one.at, one.simulation, one.at.machine.software
        loaded = projected
        if not self._is_cached(at):
            seconds = at.layer_kv_bytes / self._disk_bandwidth(at)
            loaded = sim.task(DISK, seconds, "flash", [projected])
        copying = software.flexgen_copy_bandwidth * at.machine.gpu.count
        return sim.task(COPY, at.layer_kv_bytes / copying, "host", [loaded])

    def store(self, one: Pass, num_bytes: float, after: Task) -> None:
        one.simulation.task(DISK, num_bytes / self._disk_bandwidth(one.at), "write", [after])

    def moved(self, at: Situation) -> Moved:
        read = 0.0 if self._is_cached(at) else float(at.kv_bytes)
        written = at.work.batch * at.model.token_bytes
        return Moved(read, written, read + written, self.stored(at))


class FlexGenDram(Baseline):
    """Attention by the CPUs where K and V lie, as FlexGen's own policies have it."""

    name = "flexgen-dram"
    words = "FlexGen, K and V in host memory, attention by the CPUs"
    needs_drive = False

    def why_not(self, at: Situation) -> str | None:
        room = at.machine.host.free_bytes - at.host_weights_bytes
        needed = at.at(at.work.last_tokens).kv_bytes
        if needed > room:
            return f"{needed / 1e9:,.0f} GB of K and V, room for {max(room, 0) / 1e9:,.0f} GB in host memory"
        return None

    def attention(self, one: Pass, projected: Task) -> Task:
        seconds = one.at.layer_kv_bytes / one.at.machine.host.attention_bandwidth
        return one.simulation.task(ATTENTION, seconds, "host", [projected])

    def store(self, one: Pass, num_bytes: float, after: Task) -> None:
        one.simulation.task(COPY, num_bytes / one.at.machine.software.kv_store_bandwidth, "write", [after])

    def moved(self, at: Situation) -> Moved:
        return Moved(0.0, 0.0, 0.0, self.stored(at))


class DeepSpeedDram(Baseline):
    """All weights come from host memory in every step. K and V that do not fit there are paged to disk, all of
    them, since they are read in a circle."""

    name = "deepspeed-dram"
    words = "DeepSpeed ZeRO-Inference, K and V in host memory"
    needs_drive = False

    def situation(self, at: Situation) -> Situation:
        machine = at.machine.with_value("software.weights_resident", 0)
        return replace(
            at, machine=machine.with_value("software.weights_bandwidth", machine.software.zero_bandwidth)
        )

    def why_not(self, at: Situation) -> str | None:
        if at.host_weights_bytes > at.machine.host.memory_bytes:
            return f"{at.host_weights_bytes / 1e9:,.0f} GB of weights do not fit in host memory"
        return None

    def attention(self, one: Pass, projected: Task) -> Task:
        at, sim = one.at, one.simulation
        room = at.machine.host.free_bytes - at.host_weights_bytes
        if at.at(at.work.last_tokens).kv_bytes > room:
            return sim.task(SWAP, at.layer_kv_bytes / at.machine.software.swap_bandwidth, "flash", [projected])
        return sim.task(ATTENTION, at.layer_kv_bytes / at.machine.host.attention_bandwidth, "host", [projected])

    def store(self, one: Pass, num_bytes: float, after: Task) -> None:
        one.simulation.task(GPU_LINK, num_bytes / one.at.machine.links.gpu, "write", [after])

    def moved(self, at: Situation) -> Moved:
        return Moved(0.0, 0.0, float(at.work.batch * at.model.token_bytes), self.stored(at))


__all__ = ["DeepSpeedDram", "FlexGenDram", "FlexGenSsd", "GpuResident"]
