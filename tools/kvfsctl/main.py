"""kvfsctl: make, look into, check and measure kvfs drives. One verb per module."""

import sys

import typer

from kvfsctl import (
    bench,
    check,
    demo,
    df,
    doctor,
    drive,
    export,
    fork,
    format,
    gc,
    import_file,
    info,
    ls,
    mount,
    mv,
    nvme,
    rm,
    scrub,
    serve,
    stats,
    tree,
    umount,
    wear,
)
from kvfsctl.output import EXIT_FAILED, fail

app = typer.Typer(
    name="kvfsctl",
    help="Administer kvfs drives: the KV cache of language models on flash, with attention in the drive.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the drive has errors. Sizes read as 500MB or 8GiB.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("format")(format.format_drive)
app.command("info")(info.info)
app.command("ls")(ls.ls)
app.command("stats")(stats.stats)
app.command("rm")(rm.rm)
app.command("tree")(tree.tree)
app.command("export")(export.export)
app.command("import")(import_file.import_file)
app.command("mv")(mv.mv)
app.command("fork")(fork.fork)
app.command("check")(check.check)
app.command("scrub")(scrub.scrub)
app.command("wear")(wear.wear)
app.command("gc")(gc.gc)
app.command("mount")(mount.mount)
app.command("umount")(umount.umount)
app.command("serve")(serve.serve)
app.command("df")(df.df)
app.add_typer(drive.app, name="drive")
app.add_typer(nvme.app, name="nvme")
app.add_typer(bench.app, name="bench")
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)


def run() -> None:
    """Entry point: errors that a user can act on become one line and an exit code."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(EXIT_FAILED)
    except Exception as error:
        from kvfs.errors import ERRNO  # only now: importing kvfs starts threads, and `mount` forks

        if not isinstance(error, tuple(ERRNO)):
            raise
        fail(str(error))
