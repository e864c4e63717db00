"""kvfsctl's verbs: where each is defined, and its line of `kvfsctl --help`.

A verb's module is imported when the verb is used: who asks for a status does not wait for benchmarks to load.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import NamedTuple

import typer
from typer.core import TyperGroup


class Verb(NamedTuple):
    """place: module of this package, and in it a function, or a typer.Typer with verbs of its own"""

    place: str
    line: str


VERBS = {
    "status": Verb("status:status", "What is mounted, how full and how worn; what is wrong."),
    "format": Verb("format:format_drive", "Make a drive: in a file, on an NVMe namespace, or a set."),
    "info": Verb("info:info", "A drive's geometry, room, flash health, models."),
    "ls": Verb("ls:ls", "Sequences, with model, tokens, size, time of change."),
    "stats": Verb("stats:stats", "Counters of all layers; with an interval, rates."),
    "top": Verb("top:top", "A mounted drive at work: rates, latencies by layer."),
    "events": Verb("events:events", "Warnings of all layers, drives lost and found."),
    "trace": Verb("trace:trace", "Where a decode step's time goes, for ui.perfetto.dev."),
    "rm": Verb("rm:rm", "Delete sequences."),
    "inspect": Verb("inspect:inspect", "All that is known of a sequence, or whose a block is."),
    "tree": Verb("tree:tree", "Models, and below them their sequences."),
    "export": Verb("export:export", "Write a sequence to a safetensors file."),
    "import": Verb("import_file:import_file", "Make a sequence from a safetensors file."),
    "mv": Verb("mv:mv", "Rename a sequence."),
    "fork": Verb("fork:fork", "Fork a sequence, without copying its KV."),
    "flush": Verb("flush:flush", "Make durable what a mounted drive's sequences took in."),
    "drop": Verb("drop:drop", "Have a mounted drive's read cache forget what it holds."),
    "check": Verb("check:check", "Check everything against everything else; repair."),
    "scrub": Verb("scrub:scrub", "Read every page, repair what can be, name what is lost."),
    "wear": Verb("wear:wear", "Erase counts, bad blocks, spare."),
    "gc": Verb("gc:gc", "Collect garbage now."),
    "model": Verb("model:app", "Models: which the drive knows; add one, delete one."),
    "prefix": Verb("prefix:app", "Stored prefixes: which tenant and model can reuse what."),
    "objects": Verb("objects:app", "Caches of keyed objects, and the cap of each."),
    "quota": Verb("quota:app", "Caps on what sequences of models and tenants take."),
    "evict": Verb("evict:evict", "Delete what has outlived its time, or was not used."),
    "pin": Verb("pin:pin", "Keep sequences whatever caps say."),
    "unpin": Verb("pin:unpin", "Let sequences be evicted again."),
    "seal": Verb("seal:app", "Derived data for sparse attention."),
    "mount": Verb("mount:mount", "Mount a drive as a file system."),
    "umount": Verb("umount:umount", "Unmount it, and wait until it is closed."),
    "serve": Verb("serve:serve", "Let other hosts connect to a drive, over NVMe/TCP."),
    "df": Verb("df:df", "Size, use and room of a drive."),
    "leftovers": Verb("leftovers:leftovers", "What killed processes have left; remove it."),
    "drive": Verb("drive:app", "The drives of a set: list, add, drain, return."),
    "nvme": Verb("nvme:app", "NVMe namespaces, with verbs and options of nvme-cli."),
    "config": Verb("config:app", "The configuration: what is set, and where."),
    "bench": Verb("bench:app", "Measure kvfs, rivals, and the machine's limits."),
    "plan": Verb("plan:plan", "Choose settings for a model and this machine."),
    "machine": Verb("machine:app", "What a machine would give, by a model of it."),
    "demo": Verb("demo:demo", "Generate text with the KV cache on a drive."),
    "doctor": Verb("doctor:doctor", "What this machine has of what kvfs can use."),
    "warm-up": Verb("warm_up:warm_up", "Compile attention's kernels, once for a machine."),
    "completion": Verb("completion:completion", "Print a completion script for a shell."),
    "man": Verb("man:man", "Write manual pages."),
}


@cache
def load(verb: str):
    """The verb as a command. Raises KeyError."""
    module, _, name = VERBS[verb].place.partition(":")
    found = getattr(import_module(f"kvfsctl.{module}"), name)
    alone = typer.Typer(rich_markup_mode=None)
    if isinstance(found, typer.Typer):
        alone.add_typer(found, name=verb)
    else:
        alone.command(verb)(found)
    return typer.main.get_group(alone).commands[verb]


class _Loaded(Mapping):
    """Commands by verb, each loaded when it is asked for."""

    def __getitem__(self, verb: str):
        return load(verb)

    def __contains__(self, verb: object) -> bool:
        return verb in VERBS

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


class VerbGroup(TyperGroup):
    """kvfsctl itself: its help is of the table alone."""

    def __init__(self, **attributes):
        super().__init__(**{**attributes, "commands": None})
        self.commands = _Loaded()

    def format_commands(self, ctx, formatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.line) for name, verb in VERBS.items()])
