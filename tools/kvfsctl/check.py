"""`kvfsctl check`: is everything on the drive whole?"""

import sys

from kvfsctl.output import EXIT_DAMAGED, DriveArgument, JsonOption, print_json


def check(drive: DriveArgument, json_output: JsonOption = False):
    """Check the catalogue, and read every page of every sequence against its checksum.

    Exit code 3 when something is wrong; each problem is one line.
    """
    import kvfs

    with kvfs.open(drive, cache_bytes="8MiB") as store:
        num_sequences = len(store.catalogue_rows())
        problems = store.check()
    if json_output:
        print_json("check", drive=str(drive), num_sequences=num_sequences, problems=problems)
    elif problems:
        print("\n".join(problems))
    else:
        print(f"{drive}: no errors; {num_sequences} sequences, every page matches its checksum")
    if problems:
        sys.exit(EXIT_DAMAGED)
