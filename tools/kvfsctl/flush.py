"""`kvfsctl flush`: everything appended so far, durable."""

from kvfsctl.opening import mount_folder, open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json


def flush(drive: StoreArgument, json_output: JsonOption = False):
    """Make durable what all sequences of a mounted drive have taken in, as sync(1) does for files.

    What an engine has not appended yet is not the drive's to flush. A drive that is not mounted has nothing to
    be flushed: its last user did, or has lost it.
    """
    is_mounted = mount_folder(drive) is not None
    with open_store(drive) as store:
        if is_mounted:
            store.flush()
    if json_output:
        print_json("flush", drive=str(drive), is_mounted=is_mounted)
    else:
        print(f"{drive}: {'everything is' if is_mounted else 'not mounted, everything was'} durable")
