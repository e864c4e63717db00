"""Every verb that takes a drive, found in the table, and its command line with all but the drive made up."""

from kvfsctl.verbs import VERBS, load

STAYS_OR_MEASURES = {"bench", "demo", "doctor", "plan", "warm-up"}
PLACE = {"drive", "place", "device", "location"}  # names of the arguments that are a drive or a mount
OPTIONS = {  # without which a verb does not begin
    ("mount",): ["--foreground"],
    ("model", "add"): ["--layers", "1", "--query-heads", "1", "--kv-heads", "1", "--head-dim", "64"],
    ("nvme", "passthru"): ["--opcode", "2", "--data-len", "4096", "--read"],
}


def leaves(command, words):
    below = getattr(command, "commands", {})
    if not below:
        yield words, command
    for name, each in below.items():
        yield from leaves(each, (*words, name))


def verbs_of_drives() -> dict:
    found = {}
    for verb in VERBS:
        if verb in STAYS_OR_MEASURES:
            continue
        for words, command in leaves(load(verb), (verb,)):
            arguments = [each for each in command.params if each.param_type_name == "argument"]
            if arguments and arguments[0].name in PLACE:
                found[words] = command
    return found


DRIVE_VERBS = verbs_of_drives()


def command_line(words: tuple[str, ...], command, place, folder) -> list[str]:
    line = [*words, str(place)]
    for parameter in command.params[1:]:
        if parameter.param_type_name == "argument" and parameter.required:
            line.append(str(folder / "mountpoint") if parameter.name == "mountpoint" else "1")
        elif parameter.param_type_name == "option":
            if "--yes" in parameter.opts:
                line.append("--yes")
            elif parameter.required and words not in OPTIONS:
                line += [parameter.opts[0], str(folder / "file") if "data" in parameter.name else "1"]
    return line + OPTIONS.get(words, [])
