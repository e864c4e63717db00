"""`kvfsctl nvme`: NVMe namespaces as an administrator knows them from nvme-cli, those of kvfs drives too."""

import typer

from kvfsctl import nvme_blocks, nvme_describe, nvme_dhchap_key, nvme_discover, nvme_list, nvme_passthru

app = typer.Typer(
    no_args_is_help=True,
    help="Look at NVMe namespaces, read and write their blocks, send commands. Options are those of nvme-cli."
    " LOCATION is a kvfs drive's file (inproc:FILE), spdk:ADDRESS, nvme+tcp://..., /dev/ng0n1 or /dev/nvme0n1.",
)
app.command("list")(nvme_list.list_devices)
app.command("discover")(nvme_discover.discover)
app.command("identify")(nvme_describe.identify)
app.command("smart-log")(nvme_describe.smart_log)
app.command("read")(nvme_blocks.read)
app.command("write")(nvme_blocks.write)
app.command("passthru")(nvme_passthru.passthru)
app.command("gen-dhchap-key")(nvme_dhchap_key.gen_dhchap_key)
