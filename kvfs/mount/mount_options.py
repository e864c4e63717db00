"""Options of `mount -o` and /etc/fstab: which are for kvfs, which for the kernel, and which for neither."""

from kvfs.errors import InvalidArgument

OF_OPENING = {
    "cache_bytes": str,
    "tail_bytes": str,
    "writeback_tokens": int,
    "num_workers": int,
    "collection": str,
}
OF_MOUNTING = {  # also of kvfs
    "metrics": str,
    "metrics_token": str,
}
KNOWN = OF_OPENING | OF_MOUNTING
FOR_THE_KERNEL = {"nosuid", "nodev", "noexec", "noatime", "sync", "dirsync"}
# what mount(8) keeps for itself, or what is so anyway
IGNORED = {
    *("rw", "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev"),
    *("suid", "dev", "exec", "async", "atime", "relatime", "norelatime", "strictatime", "nostrictatime"),
    *("diratime", "nodiratime", "lazytime", "nolazytime", "silent", "loud", "default_permissions"),
}


def parse_options(text: str) -> dict:
    """Keyword arguments of kvfs.mount.mounting.mount. Raises InvalidArgument for an unknown option."""
    arguments: dict = {}
    flags = set()
    for option in filter(None, text.split(",")):
        name, has_value, value = option.partition("=")
        if name in KNOWN and value:
            try:
                arguments[name] = KNOWN[name](value)
            except ValueError as error:
                raise InvalidArgument(f"option {name}: {value!r} is not a number") from error
        elif option == "ro":
            arguments["read_only"] = True
        elif option in ("allow_other", "degraded"):
            arguments[option] = True
        elif option in FOR_THE_KERNEL:
            flags.add(option)
        elif not (option in IGNORED or name.startswith(("x-", "X-")) or (name == "comment" and has_value)):
            known = ", ".join(
                ["ro", "allow_other", "degraded", *(f"{name}=" for name in KNOWN), *sorted(FOR_THE_KERNEL)]
            )
            raise InvalidArgument(f"unknown mount option {option!r}; known are {known}")
    return {**arguments, "flags": frozenset(flags)} if flags else arguments
