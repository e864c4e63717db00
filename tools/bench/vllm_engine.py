"""A vLLM engine in a process of its own, which does one request after another: a contender of vllm_connector.

python -m kvfs_bench.vllm_engine '{"model": ..., "dtype": ..., "drive": path or null}'; then lines of JSON on
stdin, {"tokens": [...], "num_new": N}, answered by {"seconds", "tokens", "cached"}.
"""

import json
import os
import sys
import time

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's time alone, not that of a pipe
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "KMP_BLOCKTIME": "0",  # while the other contender runs, this one is to be quiet
    "OMP_WAIT_POLICY": "passive",
}

BLOCK_TOKENS = 128


def _engine(model: str, dtype: str, drive: str | None):
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = drive and KVTransferConfig(
        kv_connector="KvfsConnector",
        kv_connector_module_path="kvfs.engines.vllm.connector",
        kv_role="kv_both",
        kv_connector_extra_config={"path": drive},
    )
    return LLM(
        model,
        dtype=dtype,
        block_size=BLOCK_TOKENS,
        max_model_len=8192,
        max_num_batched_tokens=8192,
        enforce_eager=True,
        seed=0,
        kv_transfer_config=transfer or None,
    )


def _answer(llm, tokens: list[int], num_new: int) -> dict:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    (output,) = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    return {
        "seconds": time.perf_counter() - began,
        "tokens": list(output.outputs[0].token_ids),
        "cached": output.num_cached_tokens,
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    llm = _engine(**json.loads(sys.argv[1]))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(llm, **json.loads(line))), file=answers, flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
