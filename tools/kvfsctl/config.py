"""`kvfsctl config`: what is set, and by which file or variable."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.output import JsonOption, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="The configuration: what is set, and where.")


@app.command()
def show(json_output: JsonOption = False):
    """Show every setting, its value and where that is from."""
    from kvfs.configuration import FIELDS, load, variable_of

    settings = load().settings
    if json_output:
        print_json(
            "config show",
            settings={
                name: {"value": setting.value, "source": setting.source, "variable": variable_of(name)}
                for name, setting in settings.items()
            },
        )
        return
    print_table(
        "configuration",
        ["setting", "value", "from", "meaning"],
        [
            [name, _shown(name, setting.value), setting.source or "default", FIELDS[name].meaning]
            for name, setting in settings.items()
        ],
        left=4,
    )


def _shown(name: str, value) -> str:
    if name.endswith("_bytes"):
        from kvfs.sizes import format_size

        return format_size(value)
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@app.command()
def check(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="By default what kvfs would read now.")
    ] = None,
    json_output: JsonOption = False,
):
    """Read the configuration and say whether it is good. Exit code 2 if it is not."""
    from kvfs.configuration import VARIABLE_OF_FILE, load

    environment = os.environ if file is None else {**os.environ, VARIABLE_OF_FILE: str(file)}
    num_set = sum(setting.source is not None for setting in load(environment).settings.values())
    if json_output:
        print_json("config check", num_set=num_set)
    else:
        print(f"the configuration is good: {num_set} settings differ from the defaults or repeat them")


@app.command()
def path(json_output: JsonOption = False):
    """Show which files are read, the last above the first, and whether they are there."""
    from kvfs.configuration import files

    found = [{"file": str(file), "exists": file.exists()} for file in files()]
    if json_output:
        print_json("config path", files=found)
        return
    for each in found:
        print(each["file"] + ("" if each["exists"] else " (not there)"))
