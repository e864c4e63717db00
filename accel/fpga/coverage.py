"""What simulated cores have covered, as a table: `python -m accel.fpga.coverage FOLDER [--holes]`.

The tests fill the folder: `KVFS_FPGA_COVERAGE=FOLDER pytest tests/unit/accel/fpga` builds cores that count
which lines of the Verilog ran and which bits rose and fell. A point is covered by one hit in any file.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

FIELD = re.compile(r"\x01([^\x02\x01]+)\x02([^\x01]*)")
KINDS = ("line", "toggle")


def points(folder: Path) -> dict[tuple[str, str, str], int]:
    """{(kind, module, what): hits} of all files in a folder."""
    found: dict[tuple[str, str, str], int] = defaultdict(int)
    for path in sorted(folder.glob("*.dat")):
        for line in path.read_text(errors="replace").splitlines():
            if not line.startswith("C "):
                continue
            point, _, hits = line[3:].rpartition("' ")
            fields = dict(FIELD.findall(point))
            kind, _, module = fields["page"].partition("/")
            what = f"{fields.get('l', '')} {fields.get('o', '')}".strip()
            name = kind.removeprefix("v_")
            found["toggle" if name == "toggle" else "line", module, what] += int(hits)
    return dict(found)


def table(found: dict) -> dict[str, dict[str, tuple[int, int]]]:
    """{module: {kind: (covered, all)}}"""
    counted = defaultdict(lambda: dict.fromkeys(KINDS, (0, 0)))
    for (kind, module, _), hits in found.items():
        covered, total = counted[module][kind]
        counted[module][kind] = covered + (hits > 0), total + 1
    return dict(counted)


def holes(found: dict) -> list[str]:
    """Points without a hit, bits and rows of one signal taken together."""
    missed = defaultdict(int)
    for (kind, module, what), hits in found.items():
        if not hits:
            missed[kind, module, re.sub(r"^\d+ |\[\d+\]", "", what) if kind == "toggle" else what] += 1
    return [f"{kind} {module}: {what} ({count})" for (kind, module, what), count in sorted(missed.items())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--holes", action="store_true", help="list what was not covered")
    arguments = parser.parse_args()
    found = points(arguments.folder)
    if not found:
        print(f"{arguments.folder} has no coverage: run the tests with KVFS_FPGA_COVERAGE={arguments.folder}")
        return 1
    counted = table(found)
    counted["all"] = {
        kind: tuple(sum(each[kind][n] for each in counted.values()) for n in (0, 1)) for kind in KINDS
    }
    print("| module | lines and branches | toggles |\n|---|---|---|")
    for module in sorted(counted, key=lambda name: (name == "all", name)):
        cells = []
        for covered, total in counted[module].values():
            cells.append(f"{covered} of {total}, {100 * covered / total:.1f}%" if total else "")
        print(f"| {module.replace(chr(92), '')} | {' | '.join(cells)} |")
    if arguments.holes:
        print("\n" + "\n".join(holes(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
