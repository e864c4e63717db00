"""`kvfsctl nvme gen-dhchap-key`: a new key for hosts and drives that prove over a network who they are."""

from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.output import JsonOption, print_json


def gen_dhchap_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file; one that exists is left alone.")],
    hmac: Annotated[
        int,
        typer.Option(
            "--hmac",
            "-m",
            metavar="N",
            help="Binds the key to the name it is used under: 1 SHA-256, 2 SHA-384, 3 SHA-512; 0: not.",
        ),
    ] = 1,
    key_length: Annotated[
        int | None,
        typer.Option("--key-length", "-l", metavar="BYTES", help="32, 48 or 64; else as long as the hash."),
    ] = None,
    json_output: JsonOption = False,
):
    """Make a key for DH-HMAC-CHAP, in the form that nvme-cli, Linux and SPDK take.

    The key is never shown: it is in the file, with mode 0600. Host and target need the same one; bring it to
    the other with something that keeps a secret, such as scp -p.
    """
    from kvfs.nvme.dhchap_key import make_key_file

    key = make_key_file(file, hmac, key_length)
    if json_output:
        print_json("nvme gen-dhchap-key", file=str(file), hmac=hmac, key_length=key.num_bytes)
    else:
        bound = f"bound by {key.transform.algorithm}" if key.transform else "not bound to a name"
        print(f"{file}: a new key of {key.num_bytes} bytes, {bound}")
