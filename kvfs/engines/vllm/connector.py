"""vLLM's KV connector over a kvfs store.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvfsConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "kvfs.engines.vllm.connector",
        "kv_connector_extra_config": {"path": "drive.kvfs", "capacity": "20GiB"}}'

Of kv_connector_extra_config:

path      of a drive, or of a mounted one (several workers need a mounted one)
size      to make the drive where there is none
capacity  which the cache keeps to; without, what the drive has
name      of the cache, "vllm" by default
staging   host memory for blocks on their way to the drive, 256MiB by default
weights   a name of the user's for weights that are no local files

One instance is made for the scheduler and one for each worker; see scheduler_side and worker_side.
"""

import atexit
import logging
from dataclasses import dataclass

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvfs.engines import shared_store
from kvfs.engines.vllm.block_objects import BlockPool, HeadShare
from kvfs.engines.vllm.cpus import unbound
from kvfs.engines.vllm.engine_identity import attention_spec, identity_of, instruction_set, names, salts
from kvfs.engines.vllm.scheduler_side import SchedulerSide
from kvfs.engines.vllm.step_plan import Transfers
from kvfs.engines.vllm.worker_side import WorkerSide
from kvfs.sizes import parse_size

log = logging.getLogger(__name__)

STAGING_BYTES = 256 << 20
OPTIONS = {"path", "size", "capacity", "name", "staging", "weights", "admission"}


@dataclass
class StepMetadata(KVConnectorMetadata):
    transfers: Transfers


class KvfsConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. Raises ValueError for what is not supported, and what kvfs.open raises."""

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        options = self._kv_transfer_config.kv_connector_extra_config
        if "path" not in options or options.keys() - OPTIONS:
            raise ValueError(
                f"kv_connector_extra_config of kvfs has a path, and may have {sorted(OPTIONS - {'path'})};"
                f" given: {sorted(options)}"
            )
        self._spec = attention_spec(vllm_config, kv_cache_config)
        self._num_heads = vllm_config.model_config.get_total_num_kv_heads()
        self._staging_bytes = parse_size(options.get("staging", STAGING_BYTES))
        identity = identity_of(vllm_config, kv_cache_config, self._spec, options.get("weights"))
        with unbound():
            self._store = shared_store.acquire(options["path"], options.get("size"))
        self._cache = self._store.object_cache(
            options.get("name", "vllm"),
            identity=identity,
            capacity_bytes=options.get("capacity"),
            admission=options.get("admission", "all"),
        )
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._failed_block_ids: set[int] = set()
        self._computed: dict[str, int] = {}  # of requests that are being admitted, by vLLM's own cache
        if role is KVConnectorRole.SCHEDULER:
            # an object that is lost is no reason to fail a request: it is computed, as any other miss
            self._kv_transfer_config.kv_load_failure_policy = "recompute"
            self._scheduler = SchedulerSide(
                self._cache, self._num_heads, self._spec.block_size, salts(vllm_config), names(vllm_config)
            )
            self._say_if_others()

    def _say_if_others(self) -> None:
        usage = self._cache.usage()
        if usage.objects and next(iter(self._cache.keys()), None) is None:
            log.warning(
                "kvfs: the %d objects in cache %r are of another model, dtype, block size, instruction set or"
                " version of vLLM: none of them is used",
                usage.objects,
                self._cache.name,
            )

    # the scheduler

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        num_found = self._scheduler.num_found(request, num_computed_tokens)
        self._computed[request.request_id] = num_computed_tokens
        return num_found, num_found > 0

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        num_computed = self._computed.pop(request.request_id, None)
        if num_computed is not None:  # None: called again, when the load is done
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_computed, num_external_tokens)

    def build_connector_meta(self, scheduler_output) -> StepMetadata:
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        blocks = scheduler_output.kv_connector_block_state

        def ids_of(request_id):
            return lambda: blocks.get_block_ids(request_id)[0]

        scheduled = {
            request_id: (computed[request_id] + num_tokens, ids_of(request_id))
            for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items()
        }
        return StepMetadata(self._scheduler.plan(scheduled))

    def update_connector_output(self, connector_output) -> None:
        if connector_output.invalid_block_ids:
            self._scheduler.failed(connector_output.invalid_block_ids)

    def request_finished(self, request, block_ids) -> tuple[bool, None]:
        self._scheduler.finished(request)
        self._computed.pop(request.request_id, None)
        return False, None  # what was to be stored has been copied

    request_finished_all_groups = request_finished

    def reset_cache(self) -> bool:
        self._scheduler.reset()
        return True

    # a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        config = self._vllm_config
        of_layer = config.compilation_config.static_forward_context
        expected = instruction_set(config, self._spec)
        packed_for = {getattr(of_layer[name], "isa", expected) for name in kv_caches if name in of_layer}
        if packed_for - {expected}:
            raise ValueError(f"vLLM packs KV for {packed_for}, where {expected!r} was expected")
        distinct = {tensor.data_ptr(): tensor for tensor in kv_caches.values()}  # layers may share theirs
        pool = BlockPool([_as_bytes(tensor) for tensor in distinct.values()])
        if pool.num_blocks != self._kv_cache_config.num_blocks:
            raise ValueError(
                f"{pool.num_blocks} blocks in memory, {self._kv_cache_config.num_blocks} scheduled"
            )
        parallel = config.parallel_config
        heads = HeadShare.of_rank(
            parallel.rank % parallel.tensor_parallel_size, parallel.tensor_parallel_size, self._num_heads
        )
        self._worker = WorkerSide(self._cache, self._store.flush, pool, heads, self._staging_bytes)
        atexit.register(self.shutdown)  # an engine in the user's own process is often never shut down

    def bind_connector_metadata(self, connector_metadata: StepMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._worker.begin()

    def start_load_kv(self, forward_context, **kwargs) -> None:
        self._worker.load(self._get_connector_metadata().transfers)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are between steps."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata, **kwargs) -> None:
        """Blocks are saved with all their layers, in wait_for_save."""

    def wait_for_save(self) -> None:
        self._worker.save(self._get_connector_metadata().transfers)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        loaded = self._worker.loaded(self._get_connector_metadata().transfers)
        self._failed_block_ids = loaded.failed_block_ids
        return None, loaded.request_ids

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._failed_block_ids

    # both

    def shutdown(self) -> None:
        if self._store is None:
            return
        if self._worker is not None:
            atexit.unregister(self.shutdown)
            self._worker.close()
        shared_store.release(self._store)
        self._store = None


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """[num_blocks, num_heads, tokens, contents] of any dtype, as a view."""
    if tensor.dim() != 4:
        raise ValueError(f"blocks of shape {tuple(tensor.shape)} are not supported")
    return tensor.view(torch.uint8).numpy()
