"""Writes anew what is kept of runs that take longer than a figure may: `python -m
machine_model.make_tables`."""

import json

from machine_model.amplification import FULLNESS, TABLE, UNITS, measure


def main() -> None:
    waf = [[round(measure(units, fullness), 4) for units in UNITS] for fullness in FULLNESS]
    TABLE.write_text(json.dumps({"fullness": FULLNESS, "units": UNITS, "waf": waf}, indent=1) + "\n")


if __name__ == "__main__":
    main()
