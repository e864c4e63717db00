"""kvfsctl: make, look into, check and measure kvfs drives. One verb per module."""

import os
import sys
from typing import Annotated

import typer

from kvfsctl.output import EXIT_CODES, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, fail
from kvfsctl.verbs import VerbGroup

_EXIT_CODES = ", ".join(f"{code} {short}" for code, (short, _) in EXIT_CODES.items())

app = typer.Typer(
    name="kvfsctl",
    cls=VerbGroup,
    help="Administer kvfs drives: the KV cache of language models on flash, with attention in the drive.",
    epilog=f"Exit codes: {_EXIT_CODES}. Sizes read as 500MB or 8GiB.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from kvfs import __version__

        print(f"kvfsctl {__version__}")
        raise typer.Exit


@app.callback()
def _before_any_verb(
    no_color: Annotated[bool, typer.Option("--no-color", help="Print plain text; so does NO_COLOR=1.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print kvfs's version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    if no_color:
        os.environ["NO_COLOR"] = "1"  # which rich looks at


def run() -> None:
    """Entry point: errors that a user can act on become one line and an exit code."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # whoever read has gone: nothing is left to say, and the interpreter is not to say so either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except Exception as error:
        from kvfs.errors import ERRNO, BadConfiguration

        if isinstance(error, OSError) and error.filename is not None:
            fail(f"{os.fsdecode(error.filename)}: {error.strerror}")
        if not isinstance(error, tuple(ERRNO)):
            raise
        fail(str(error), EXIT_USAGE if isinstance(error, BadConfiguration) else EXIT_FAILED)
