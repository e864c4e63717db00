"""Engines in a process of their own, one after another: python -m tests.engines.vllm.engine_process < jobs.

jobs: JSON, a list of {"model", "prompts": [[token]], and optionally "drive", "extra" (of the connector's
configuration), "engine" (arguments of LLM), "salt", "attention" (a drive), "kill_after" (writes of objects),
"together" (one batch), "tokens"}. Prints for each a line of JSON: "tokens", "cached", "usage", "requests" (as
counted), "error", "log".
"""

import json
import logging
import os
import signal
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


class Lines(logging.Handler):
    """What kvfs logs."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []
        logging.getLogger("kvfs").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())

    def take(self):
        lines, self.lines = self.lines, []
        return lines


def kill_in_a_write(number):
    """End this process in the middle of the number-th batch of writes from here on."""
    from spdk_glue.namespace import Namespace

    write, count = Namespace.write_scattered, iter(range(1, 1 << 30))

    def write_some(self, pieces, *args):
        if next(count) < number:
            return write(self, pieces, *args)
        write(self, pieces[: len(pieces) // 2], *args)
        os.kill(os.getpid(), signal.SIGKILL)

    Namespace.write_scattered = write_some


def run(job, lines):
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from kvfs.engines import shared_store
    from kvfs.engines.vllm.engine_identity import identity_of

    settings = {"dtype": "float32", "block_size": 32, "max_model_len": 512, "enforce_eager": True, "seed": 0}
    settings |= {"skip_tokenizer_init": True, "num_gpu_blocks_override": 64, **job.get("engine", {})}
    if "drive" in job:
        settings["kv_transfer_config"] = KVTransferConfig(
            kv_connector="KvfsConnector",
            kv_connector_module_path="kvfs.engines.vllm.connector",
            kv_role="kv_both",
            kv_connector_extra_config={"path": job["drive"], **job.get("extra", {})},
        )
    try:
        llm = LLM(job["model"], **settings)
    except Exception as error:
        return {"error": str(error), "log": lines.take()}
    if "kill_after" in job:
        kill_in_a_write(job["kill_after"])
    sampling = SamplingParams(temperature=0, max_tokens=job.get("tokens", 8), detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    if "salt" in job:
        prompts = [{**prompt, "cache_salt": job["salt"]} for prompt in prompts]
    calls = [prompts] if job.get("together") else [[prompt] for prompt in prompts]
    outputs = [output for call in calls for output in llm.generate(call, sampling, use_tqdm=False)]
    answer = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
    }
    store = next((entry[0] for entry in shared_store._stores.values()), None)
    if "drive" in job:
        connector = get_kv_transfer_group()
        connector._worker._writer.close()
        answer["usage"] = connector._cache.usage()._asdict()
        answer["requests"] = connector._store.counters()["objects"]["tenants"]
        answer["identity"] = identity_of(
            connector._vllm_config, connector._kv_cache_config, connector._spec, None
        )
    elif store is not None:
        answer["sequences"] = len(store.sequences())
    llm.llm_engine.engine_core.shutdown()
    return {**answer, "log": lines.take()}


def main():
    jobs, lines = json.load(sys.stdin), Lines()
    for job in jobs:
        attention = job.get("attention")
        if attention is not None:
            from kvfs.engines.vllm import enable_drive_attention

            enable_drive_attention(attention)
        print(json.dumps({"error": None, **run(job, lines)}), flush=True)


if __name__ == "__main__":
    main()
