"""Random command lines over all verbs and options, in process: tools/suites/fuzz_kvfsctl.py runs many.

Every word is of a pool, and every path in it lies in a scratch folder: verbs that overwrite files find none
that matter. Verbs that stay (mount, serve) are given no drive that they could stay with; those that measure
(bench, demo, ...) are left out.
"""

import random
from pathlib import Path

import kvfs
from kvfsctl.output import EXIT_CODES
from kvfsctl.verbs import VERBS, load
from tests.unit.kvfsctl.command_line import kvfsctl

LEFT_OUT = {("bench",), ("demo",), ("doctor",), ("plan",), ("warm-up",), ("machine", "calibrate")}
STAYS = {"mount": ["--foreground"], "serve": []}
PLACES = [
    "good.kvfs",
    "cut.kvfs",
    "zeros.kvfs",
    "text",
    "empty",
    "folder",
    "missing",
    "missing/below",
    "pool.kvfs-set",
]
OPEN = {"good.kvfs", "pool.kvfs-set"}
PLACES += ["", ".", "link-loop", "nvme+tcp://127.0.0.1:1/nqn", "nvme+tcp://", "spdk:nothing", "/dev/ng99n1"]
WORDS = [
    "chat",
    "tiny",
    "nobody",
    "-7",
    "0",
    "nan",
    "1e400",
    "8MiB",
    "-1GiB",
    "sketch",
    "none",
    "\udcff",
    "\u202e",
]
WORDS += [
    "a/b",
    "..",
    "x" * 300,
    "[red]",
    "%s",
    "--",
    "--nonsense",
    "0x10",
    "99999999999999999999",
    "w.png",
    "a\nb",
]


def leaves() -> dict[tuple[str, ...], object]:
    """Commands without verbs of their own, by the words that lead to them."""
    found = {}
    for verb in VERBS:
        found |= _below(load(verb), (verb,))
    return {words: command for words, command in found.items() if LEFT_OUT.isdisjoint({words[:1], words[:2]})}


def _below(command, words: tuple[str, ...]) -> dict[tuple[str, ...], object]:
    verbs = getattr(command, "commands", {})
    if not verbs:
        return {words: command}
    return {leaf: each for verb, below in verbs.items() for leaf, each in _below(below, (*words, verb)).items()}


def make_places(folder: Path) -> None:
    """What the pool names: a drive, and what resembles one."""
    good = folder / "good.kvfs"
    kvfs.format(good, "48MiB")
    with kvfs.open(good, cache_bytes="8MiB", worker="reference") as store:
        model = store.add_model("tiny", num_layers=1, num_query_heads=2, num_kv_heads=1, head_dim=64)
        store.create_sequence(model, "chat")
    content = good.read_bytes()[:100_000]
    (folder / "cut.kvfs").write_bytes(content)
    (folder / "zeros.kvfs").write_bytes(bytes(100_000))
    (folder / "text").write_text("no drive\n")
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "link-loop").symlink_to("link-loop")
    (folder / "pool.kvfs-set").write_text('drives = ["missing", "good.kvfs"]\n')


def command_line(choose: random.Random, verbs: dict) -> list[str]:
    words, command = choose.choice(sorted(verbs.items(), key=lambda item: item[0]))
    stays = words[0] in STAYS
    places = [place for place in PLACES if not stays or place not in OPEN]
    line = [*words, *STAYS.get(words[0], [])]
    num_words = len(line)
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            if choose.random() < 0.9:
                line.append(choose.choice(places if len(line) == num_words else places + WORDS))
        elif "--follow" in parameter.opts:  # has no end
            continue
        elif choose.random() < 0.3:
            line.append(choose.choice(parameter.opts))
            if not parameter.is_flag:
                line.append(choose.choice(places + WORDS))
    if choose.random() < 0.1:
        line.insert(choose.randrange(len(line) + 1), choose.choice(WORDS))
    return line


def complaint_about(line: list[str]) -> str | None:
    """What a user would find wrong with how a command line ended."""
    done = kvfsctl(*line)
    if "Traceback" in done.stderr:
        return done.stderr
    if done.returncode not in EXIT_CODES:
        return f"exit code {done.returncode}"
    if done.returncode == 1 and "Aborted" not in done.stderr and not done.stderr.startswith("kvfsctl: "):
        return f"exit code 1 with {done.stderr!r}"
    if done.stderr.count("\n") > 1 and done.stderr.startswith("kvfsctl: "):
        return f"more than one line: {done.stderr}"
    return None
