"""`kvfsctl completion`: what a shell needs to complete kvfsctl's words."""

from enum import StrEnum
from typing import Annotated

import typer


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="The shell it is for.")]):
    """Print a completion script: kvfsctl completion bash > /etc/bash_completion.d/kvfsctl"""
    from typer.completion import get_completion_script

    print(
        get_completion_script(prog_name="kvfsctl", complete_var="_KVFSCTL_COMPLETE", shell=shell.value).strip()
    )
