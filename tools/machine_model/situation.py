"""One decode step or prefill to be modelled: the machine, the language model, the workload, and sizes of
these."""

from dataclasses import dataclass, replace
from functools import cached_property

from kvfs.layout import GroupLayout, KvGeometry
from kvfs_bench.planner.formulas import page_writeback_tokens
from machine_model.language_model import ITEM_BYTES, LanguageModel
from machine_model.machine import Machine
from machine_model.workload import Workload

GPU_ROOM = 0.8  # of a GPU's memory, for weights and K and V; the rest is activations and the framework's


@dataclass(frozen=True)
class Situation:
    """context: tokens of each sequence before the step, or in prefill of the input."""

    machine: Machine
    model: LanguageModel
    work: Workload
    num_drives: int
    context: int = 0

    def at(self, context: int) -> "Situation":
        return replace(self, context=context)

    @property
    def geometry(self) -> KvGeometry:
        return self.model.geometry

    @property
    def page_bytes(self) -> int:
        return int(self.machine.drive.page_bytes)

    @property
    def units(self) -> int:
        """Sequences times KV heads: what is spread over drives, whole heads first."""
        return self.work.batch * self.geometry.num_kv_heads

    @cached_property
    def drive_units(self) -> list[int]:
        """Of each drive: heads spread evenly, and of heads that are left over the batch."""
        base, rest = divmod(self.units, self.num_drives)
        return [base + (number < rest) for number in range(self.num_drives)]

    @property
    def writeback_tokens(self) -> int:
        """Tokens of a spill; by default what fills a page."""
        wanted = self.work.writeback_tokens or page_writeback_tokens(self.page_bytes, self.geometry.head_dim)
        return min(wanted, self.geometry.group_tokens)

    @property
    def flash_tokens(self) -> int:
        """Of each sequence; those behind them wait in host memory."""
        return self.context - self.context % self.writeback_tokens

    @property
    def tail_tokens(self) -> float:
        """In host memory, on average over the steps around this one."""
        return (self.writeback_tokens - 1) / 2

    @property
    def layer_kv_bytes(self) -> int:
        """Of all sequences, in memory."""
        return self.work.batch * self.context * self.model.layer_token_bytes

    @property
    def kv_bytes(self) -> int:
        return self.layer_kv_bytes * self.geometry.num_layers

    @cached_property
    def resident_share(self) -> float:
        """Of the layers' weights, what stays in the GPUs."""
        if not self.machine.software.weights_resident:
            return 0.0
        room = GPU_ROOM * self.machine.gpu.memory_bytes * self.machine.gpu.count
        layers = self.geometry.num_layers * self.model.layer_bytes
        return max(0.0, min(1.0, (room - (self.model.weights_bytes - layers)) / layers))

    @property
    def host_weights_bytes(self) -> float:
        """Of the weights, those in host memory."""
        return (1 - self.resident_share) * self.model.weights_bytes

    @property
    def page_token_bytes(self) -> float:
        """On flash, one layer of one token, slack of pages included."""
        layout = GroupLayout(self.geometry, self.page_bytes)
        return layout.layer_lbas * self.page_bytes / self.geometry.group_tokens

    # the GPU's roofline

    def gpu_seconds(self, flops: float, num_bytes: float) -> float:
        """The longer of computing and moving, on all GPUs together."""
        gpu = self.machine.gpu
        compute = flops / (gpu.flops * gpu.flops_share * gpu.count)
        return max(compute, num_bytes / (gpu.memory_bandwidth * gpu.bandwidth_share * gpu.count))

    def matrix_seconds(self, weights: float, rows: int) -> float:
        """Of multiplying rows by matrices of so many elements."""
        return self.gpu_seconds(2.0 * weights * rows, ITEM_BYTES * weights)

    @property
    def projection_seconds(self) -> float:
        """Queries, keys and values of a step's tokens, one layer."""
        geometry = self.geometry
        heads = geometry.num_query_heads + 2 * geometry.num_kv_heads
        return self.matrix_seconds(heads * geometry.head_dim * self.model.hidden_size, self.work.batch)

    @property
    def rest_seconds(self) -> float:
        """The output projection and the MLP of one layer, and what a layer takes beside its work."""
        geometry = self.geometry
        out = geometry.num_query_heads * geometry.head_dim * self.model.hidden_size
        return (
            self.matrix_seconds(out + self.model.mlp_weights, self.work.batch) + self.machine.gpu.layer_seconds
        )

    @property
    def head_seconds(self) -> float:
        """The vocabulary's logits."""
        return self.matrix_seconds(self.model.vocab_size * self.model.hidden_size, self.work.batch)

    @property
    def weights_seconds(self) -> float:
        """One layer's weights from host memory."""
        rate = self.machine.software.weights_bandwidth * self.machine.gpu.count
        return (1 - self.resident_share) * self.model.layer_bytes / rate

    @property
    def prefill_gpu_seconds(self) -> float:
        """One layer over the whole input."""
        tokens, geometry = self.work.input_tokens, self.geometry
        weights = self.model.attention_weights + self.model.mlp_weights
        attention = 2.0 * tokens * tokens * geometry.num_query_heads * geometry.head_dim  # causal: half of 4
        flops = self.work.batch * (2.0 * weights * tokens + attention)
        return self.gpu_seconds(flops, ITEM_BYTES * weights) + self.machine.gpu.layer_seconds
