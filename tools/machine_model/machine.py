"""What a machine is made of, as plain numbers in bytes, seconds and FLOP/s; see catalogue.py for the files.

                gpu.memory_bandwidth
 GPU  ------------------------------------  its memory
  | gpu_link
host memory, CPUs
  | drives_link       shared by all drives, through a switch or the processor's lanes
  +---- drive.link_bandwidth ---- drive: flash channels -> internal path -> accelerator
"""

from dataclasses import dataclass, field, fields, replace

from ftl.geometry import Geometry
from ftl.virtual_clock import NandTiming
from machine_model import quantities as q
from machine_model.quantities import BadMachine, Number, Unit


def number(unit: Unit, default: float | None = None, required: bool = True):
    """A dataclass field read from a TOML number."""
    metadata = {"unit": unit, "required": required}
    return field(metadata=metadata) if required else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Part:
    name: str

    @classmethod
    def units(cls) -> dict[str, Unit]:
        return {one.name: one.metadata["unit"] for one in fields(cls) if "unit" in one.metadata}

    @classmethod
    def required(cls) -> set[str]:
        return {one.name for one in fields(cls) if one.metadata.get("required")}


@dataclass(frozen=True)
class Gpu(Part):
    """flops: dense, of the dtype that models run in; flops_share, bandwidth_share: what kernels reach of the
    data sheet's; layer_seconds: of a layer's launches and the framework's code beside any work"""

    count: int = number(q.FEW)
    flops: float = number(q.FLOPS)
    flops_share: float = number(q.SHARE)
    memory_bytes: float = number(q.MEMORY)
    memory_bandwidth: float = number(q.GPU_MEMORY_RATE)
    bandwidth_share: float = number(q.SHARE)
    layer_seconds: float = number(q.SECONDS)
    price_usd: float | None = number(q.DOLLARS, required=False)
    watts: float | None = number(q.WATTS, required=False)


@dataclass(frozen=True)
class Host(Part):
    """attention_bandwidth: of K and V in memory that the CPUs attend over; free_bytes: of memory_bytes, for
    weights, K and V and the page cache"""

    memory_bytes: float = number(q.MEMORY)
    free_bytes: float = number(q.MEMORY)
    memory_bandwidth: float = number(q.RATE)
    attention_bandwidth: float = number(q.RATE)
    tail_seconds: float = number(q.SECONDS)
    price_usd: float | None = number(q.DOLLARS, required=False)
    watts: float | None = number(q.WATTS, required=False)


@dataclass(frozen=True)
class Links(Part):
    """gpu: host memory to each GPU; drives: what all drives share towards host and GPU; latency: of a
    message"""

    gpu: float = number(q.RATE)
    drives: float = number(q.RATE)
    latency: float = number(q.SECONDS)


@dataclass(frozen=True)
class Drive(Part):
    """internal_bandwidth: from the flash's channels to the accelerator; accelerator_bandwidth: of K and V that
    it attends over, None: the host's CPUs do; read_share: of the channels' bandwidth that reading reaches;
    window_bytes: read while the one before is computed; command_seconds: of an attention command beside its
    bytes; small_write_seconds: of a page that the host writes and waits for; reclaim_unit_bytes: what garbage
    collection frees at once"""

    channels: int = number(q.FEW)
    dies_per_channel: int = number(q.FEW)
    planes_per_die: int = number(q.FEW)
    page_bytes: int = number(q.PAGE)
    channel_bandwidth: float = number(q.RATE)
    read_share: float = number(q.SHARE)
    read_seconds: float = number(q.READ_TIME)
    program_seconds: float = number(q.PROGRAM_TIME)
    erase_seconds: float = number(q.ERASE_TIME)
    link_bandwidth: float = number(q.RATE)
    internal_bandwidth: float = number(q.RATE)
    small_write_seconds: float = number(q.SECONDS)
    window_bytes: float = number(q.BYTES)
    command_seconds: float = number(q.SECONDS)
    capacity_bytes: float = number(q.BYTES)
    spare_share: float = number(q.SPARE)
    reclaim_unit_bytes: float = number(q.BYTES)
    rated_cycles: int = number(q.CYCLES)
    accelerator_bandwidth: float | None = number(q.RATE, required=False)
    price_usd: float | None = number(q.DOLLARS, required=False)
    watts: float | None = number(q.WATTS, required=False)

    def geometry(self, num_superblocks: int = 8, pages_per_erase_block: int = 256) -> Geometry:
        """Of the flash, shortened: what the virtual clock needs of it."""
        return Geometry(
            page_size=int(self.page_bytes),
            num_channels=self.channels,
            dies_per_channel=self.dies_per_channel,
            planes_per_die=self.planes_per_die,
            pages_per_erase_block=pages_per_erase_block,
            num_superblocks=num_superblocks,
        )

    def timing(self) -> NandTiming:
        """The link of the clock is the path to the accelerator, or to the host where the host attends."""
        inside = self.internal_bandwidth if self.accelerator_bandwidth else self.link_bandwidth
        return NandTiming(
            read_ns=round(self.read_seconds * 1e9),
            program_ns=round(self.program_seconds * 1e9),
            erase_ns=round(self.erase_seconds * 1e9),
            channel_bytes_per_s=self.channel_bandwidth * self.read_share,
            link_bytes_per_s=inside,
        )


@dataclass(frozen=True)
class Software(Part):
    """Rates of engines' host code, which is slower than the hardware.

    weights_resident: 1 if weights stay in the GPU as far as they fit, 0 if all come from host memory in each
        step
    weights_bandwidth: from host memory to each GPU
    weights_overlap: 1 if a layer's weights come while the layer before is computed; 0 if one after the other,
        as FlexGen's cost model has it
    flexgen_copy_bandwidth: FlexGen's, from a mapped file that is in the page cache to where it is used, per GPU
    flexgen_disk_bandwidth: the same file's, from disk into the page cache, all drives
    flexgen_page_cache: 1 if its files are mapped, so that host memory keeps them; 0 if they are read around it
    kv_store_bandwidth: of prefill's K and V from the GPU into host memory, by FlexGen
    zero_bandwidth: of weights from host memory to each GPU, by DeepSpeed's ZeRO-Inference
    swap_bandwidth: of memory beyond the host's, paged in and out
    """

    weights_resident: int = number(q.SWITCH)
    weights_bandwidth: float = number(q.RATE)
    weights_overlap: int = number(q.SWITCH)
    flexgen_copy_bandwidth: float = number(q.RATE)
    flexgen_disk_bandwidth: float = number(q.RATE)
    flexgen_page_cache: int = number(q.SWITCH)
    kv_store_bandwidth: float = number(q.RATE)
    zero_bandwidth: float = number(q.RATE)
    swap_bandwidth: float = number(q.RATE)


PARTS = {"gpu": Gpu, "host": Host, "links": Links, "drive": Drive, "software": Software}


@dataclass(frozen=True)
class Machine:
    """num_drives: unless asked for others."""

    name: str
    title: str
    gpu: Gpu
    host: Host
    links: Links
    drive: Drive
    software: Software
    num_drives: int
    sources: dict[str, Number] = field(repr=False, default_factory=dict)

    def numbers(self) -> list[Number]:
        """Every number, with its source."""
        return list(self.sources.values())

    def with_changed(self, path: str, factor: float) -> "Machine":
        """The same machine with one number, as `drive.channel_bandwidth`, times factor; no farther than that
        number's limits, and to the next number that it may be. Raises BadMachine."""
        if path not in self.sources:
            raise BadMachine(f"{path!r} is no number of the machine {self.name}")
        unit = self._unit(path)
        return self.with_value(path, unit.nearest(self.sources[path].value * factor))

    def _unit(self, path: str) -> Unit:
        part, _, name = path.partition(".")
        if path == "num_drives":
            return q.COUNT
        if part not in PARTS or name not in PARTS[part].units():
            raise BadMachine(f"{path!r} is no number of the machine {self.name}")
        return PARTS[part].units()[name]

    def with_value(self, path: str, value: float) -> "Machine":
        """The same machine with one number set. Raises BadMachine."""
        part, _, name = path.partition(".")
        value = self._unit(path).checked(path, value, value)
        sources = dict(self.sources)
        if path in sources:
            sources[path] = replace(sources[path], value=value, source="changed", assumed=True)
        if path == "num_drives":
            return replace(self, num_drives=value, sources=sources)
        changed = replace(getattr(self, part), **{name: value})
        return replace(self, **{part: changed}, sources=sources)
