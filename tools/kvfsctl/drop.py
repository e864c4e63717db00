"""`kvfsctl drop`: empty the drive's read cache."""

from kvfsctl.opening import each_drive, mount_folder, open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json


def drop(drive: StoreArgument, json_output: JsonOption = False):
    """Have a mounted drive forget what its read cache holds, so that what follows is read from flash.

    For measuring, as /proc/sys/vm/drop_caches; nothing is lost. What is being read just now stays. A drive that
    is not mounted holds nothing in memory.
    """
    found = []
    if mount_folder(drive) is not None:
        found = [{"drive": str(one), "cache_lines": care.drop_cache()} for one, care in each_drive(drive)]
    else:
        open_store(drive).close()  # what is no drive, or somebody has open, is said
    if json_output:
        print_json("drop", drive=str(drive), dropped=found)
        return
    for one in found:
        print(f"{one['drive']}: {one['cache_lines']:,} lines of its cache are forgotten")
    if not found:
        print(f"{drive}: not mounted, nothing is cached")
