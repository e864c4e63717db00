"""The scheduler's half: which blocks of a request are stored, and which are to be.

Blocks are known by vLLM's chained hashes, SHA-256 over the tokens from the first on, the cache salt, images and
the adapter's name. A request counts on a block only if all its KV heads are there.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from kvfs.engines.vllm.block_objects import NULL_BLOCK, head_keys
from kvfs.engines.vllm.step_plan import BlockTransfer, Transfers
from kvfs.errors import KvfsError
from kvfs.objects.counters import Miss, RequestMiss

log = logging.getLogger(__name__)

BLOCKS_AT_ONCE = 64  # looked up together; a prompt that nobody knows costs no more


@dataclass
class Tracked:
    """A request that the engine has. num_stored: leading blocks that are stored, or handed over to be.

    num_wanted, num_given: tokens that vLLM's own cache did not have, and those of them that the drive gave;
    miss: why it gave no more. Of the first look-up: what is looked up again was this request's own.
    """

    request: object
    salt: bytes  # beyond vLLM's hashes
    num_stored: int = 0
    num_wanted: int | None = None
    num_given: int = 0
    miss: RequestMiss | None = None
    first_loading: int = 0
    loading: Sequence[int] = ()  # block ids
    preemptions_at_load: int = -1


class SchedulerSide:
    """cache: a kvfs object cache; num_heads: KV heads of the whole model; block_tokens: tokens in a block.

    salt_of: bytes that a request's keys depend on beyond vLLM's hashes, or None if it must not be cached
    names_of: a request's tenant and model, as it is counted
    """

    def __init__(
        self,
        cache,
        num_heads: int,
        block_tokens: int,
        salt_of: Callable[[object], bytes | None],
        names_of: Callable[[object], tuple[str, str]],
    ):
        self._cache = cache
        self._num_heads = num_heads
        self._block_tokens = block_tokens
        self._salt_of = salt_of
        self._names_of = names_of
        self._tracked: dict[str, Tracked] = {}
        self._new_loads: list[BlockTransfer] = []
        self._reset_salt = b""

    def num_found(self, request, num_computed: int) -> int:
        """How many tokens beyond those computed are stored, in whole blocks."""
        tracked = self._track(request)
        if tracked is None or tracked.preemptions_at_load == request.num_preemptions:
            return 0  # what failed to load once is computed
        keys = self._keys(tracked, 0, len(request.block_hashes))
        tracked.num_stored = self._leading(keys)
        num_found = max(0, tracked.num_stored * self._block_tokens - num_computed)
        if tracked.num_wanted is None:
            tracked.num_wanted = max(0, len(keys) * self._block_tokens - num_computed)
            tracked.num_given = num_found
            if num_found < tracked.num_wanted:
                tracked.miss = self._why(keys[tracked.num_stored])
        return num_found

    def _why(self, key: bytes) -> RequestMiss:
        """There is no such block; the objects' misses are counted."""
        of_heads = self._cache.look_up(head_keys([key], 0, self._num_heads))
        return RequestMiss.IDENTITY if Miss.IDENTITY in of_heads else RequestMiss.ABSENT

    def _track(self, request) -> Tracked | None:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            salt = self._salt_of(request)
            if salt is not None:
                salt += self._reset_salt
                tracked = self._tracked[request.request_id] = Tracked(request, salt)
        return tracked

    def _keys(self, tracked: Tracked, start: int, stop: int) -> list[bytes]:
        hashes = tracked.request.block_hashes[start:stop]
        if not tracked.salt:
            return [bytes(block_hash) for block_hash in hashes]
        return [_salted(block_hash, tracked.salt) for block_hash in hashes]

    def _leading(self, keys: list[bytes]) -> int:
        """How many blocks from the first on are there, whole."""
        for start in range(0, len(keys), BLOCKS_AT_ONCE):
            found = self._cache.contains(head_keys(keys[start : start + BLOCKS_AT_ONCE], 0, self._num_heads))
            if False in found:
                return start + found.index(False) // self._num_heads
        return len(keys)

    def allocated(self, request, block_ids: Sequence[int], num_computed: int, num_external: int) -> None:
        """The engine has chosen to have `num_external` tokens loaded after its own `num_computed`."""
        tracked = self._track(request)
        if tracked is None or not num_external:
            return
        start = num_computed // self._block_tokens
        stop = start + num_external // self._block_tokens
        tracked.first_loading, tracked.loading = start, block_ids[start:stop]
        tracked.preemptions_at_load = request.num_preemptions
        self._new_loads.append(_transfer(request.request_id, self._keys(tracked, start, stop), tracked.loading))

    def failed(self, block_ids: set[int]) -> None:
        """Blocks that could not be loaded: they are stored again when they have been computed."""
        for tracked in self._tracked.values():
            lost = [index for index, block_id in enumerate(tracked.loading) if block_id in block_ids]
            if lost:
                tracked.num_stored = min(tracked.num_stored, tracked.first_loading + lost[0])
                num_given = lost[0] * self._block_tokens
                if num_given < tracked.num_given:
                    tracked.num_given, tracked.miss = num_given, RequestMiss.LOST

    def plan(self, scheduled: dict[str, tuple[int, Callable[[], Sequence[int]]]]) -> Transfers:
        """The next step's transfers.

        scheduled: by request id the tokens that are computed once the step has run, and its block ids
        """
        transfers = Transfers(loads=self._new_loads, computes=bool(scheduled))
        self._new_loads = []
        for request_id, (num_computed, block_ids_of) in scheduled.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            # tokens sampled ahead of the scheduler have no hash yet: their block waits for a later step
            num_full = min(num_computed // self._block_tokens, len(tracked.request.block_hashes))
            start, tracked.num_stored = tracked.num_stored, max(tracked.num_stored, num_full)
            if start < num_full:
                keys = self._keys(tracked, start, num_full)
                transfers.saves.append(_transfer(request_id, keys, block_ids_of()[start:num_full]))
        return transfers

    def finished(self, request) -> None:
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None and tracked.num_wanted:
            self._count(tracked)

    def _count(self, tracked: Tracked) -> None:
        tenant, model = self._names_of(tracked.request)
        log.debug(
            "kvfs: request %s of tenant %r, model %r: %d of %d tokens were stored%s",
            tracked.request.request_id,
            tenant,
            model,
            tracked.num_given,
            tracked.num_wanted,
            f", then {tracked.miss}" if tracked.miss else "",
        )
        try:
            self._cache.count_request(tenant, model, tracked.num_wanted, tracked.num_given, tracked.miss)
        except KvfsError as error:  # the answer is there: that a mount is gone since is no reason to fail it
            log.warning("kvfs: a request is not counted: %s", error)

    def reset(self) -> None:
        """Forget what is stored, as far as this engine goes: its weights may be others from here on.

        Nothing is deleted: to an engine with the weights of the files it is still right.
        """
        self._reset_salt = os.urandom(16)
        for tracked in self._tracked.values():
            tracked.salt += self._reset_salt
            tracked.num_stored = 0


def _salted(block_hash: bytes, salt: bytes) -> bytes:
    return blake2b(block_hash, digest_size=32, key=blake2b(salt, digest_size=32).digest()).digest()


def _transfer(request_id: str, keys: list[bytes], block_ids: Sequence[int]) -> BlockTransfer:
    """Without the blocks that a sliding window has no use for."""
    pairs = [(key, block_id) for key, block_id in zip(keys, block_ids, strict=True) if block_id != NULL_BLOCK]
    return BlockTransfer(request_id, [key for key, _ in pairs], [block_id for _, block_id in pairs])
