"""Where an owner's socket lies: a folder that others cannot put one into."""

import os
import secrets
import socket
import stat
from contextlib import suppress
from pathlib import Path

from kvfs.errors import InvalidArgument, NotPermitted

MAX_PATH_BYTES = 107  # of a Unix socket's address, without the NUL


def new_socket_path(for_everyone: bool) -> Path:
    """A name for a new socket.

    for_everyone: others than this user are to reach it, as with a mount that allows others
    """
    folder = _folder(for_everyone)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise NotPermitted(
            f"{folder} cannot be made, where the socket for clients would lie: {error}"
        ) from error
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise NotPermitted(f"{folder} must be a folder that only its owner, this user, can write to")
    if for_everyone:
        folder.chmod(0o755)
    _remove_dead(folder)
    return folder / f"{secrets.token_hex(8)}.sock"


def socket_folders() -> list[Path]:
    """Where sockets of this user's servers are."""
    folders = {_folder(for_everyone) for for_everyone in (False, True)}
    return sorted(folder for folder in folders if folder.is_dir())


def _folder(for_everyone: bool) -> Path:
    if os.geteuid() == 0:
        return Path("/run/kvfs")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime) and not for_everyone:
        return Path(runtime) / "kvfs"
    return Path(f"/tmp/kvfs-{os.geteuid()}{'-shared' if for_everyone else ''}")


def _remove_dead(folder: Path) -> None:
    """Names that killed owners have left."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


def listen(path: Path, backlog: int, for_everyone: bool) -> socket.socket:
    """A socket that listens under a name; the name appears when it does."""
    if len(os.fsencode(path)) > MAX_PATH_BYTES - len(".new"):
        raise InvalidArgument(f"{path} is too long for a socket's name: choose a shorter folder")
    listener = socket.socket(socket.AF_UNIX)
    nascent = path.with_name(path.name + ".new")
    try:
        listener.bind(str(nascent))
        nascent.chmod(0o666 if for_everyone else 0o600)
        listener.listen(backlog)
        nascent.rename(path)
    except BaseException:
        listener.close()
        raise
    return listener
