"""Rebuild the C glue in place, beside its sources: after a change of C, where `pip install` would do all again.

python tools/build_glue.py [FOLDER ...]       # all by default, such as ftl/direct_io
"""

import runpy
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(
    str(found.parent.relative_to(ROOT))
    for top in ("ftl", "kvfs", "spdk_glue")
    for found in (ROOT / top).glob("**/build.py")
)


def build(folder: str) -> str:
    """What was built, or why not."""
    made = runpy.run_path(str(ROOT / folder / "build.py"))
    _, why_not = made["find_spdk"]() if "find_spdk" in made else ({}, "")
    if why_not:
        return f"{folder} is left out: {why_not}"
    builder = made.get("ffibuilder") or made["make_ffibuilder"]()
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(builder.compile(tmpdir=scratch))
        fresh = Path(shutil.copy2(built, ROOT / folder / f".{built.name}"))
        return str(fresh.replace(ROOT / folder / built.name))  # processes that run with the old one keep it


def main(folders: list[str]) -> None:
    unknown = set(folders) - set(FOLDERS)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: no glue there; it is in {', '.join(FOLDERS)}")
    for folder in folders or FOLDERS:
        print(build(folder))


if __name__ == "__main__":
    main([folder.rstrip("/") for folder in sys.argv[1:]])
