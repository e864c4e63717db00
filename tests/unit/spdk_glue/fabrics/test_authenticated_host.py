"""Our initiator and our target over a socket: a host proves itself again, while it is in use."""

import time

import numpy as np
import pytest

from spdk_glue.fabrics.authentication import Credentials, Key
from spdk_glue.fabrics.initiator.controller import Controller
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import NvmeError
from spdk_glue.transports.tcp import TcpTransport

from .authenticated_target import AuthenticatedTarget, host_name

HOST = host_name(1)


@pytest.fixture
def proofs(monkeypatch):
    """Of queues that were connected already."""
    found, prove = [], Controller.prove_again

    def noting(self, queue, generation):
        found.append(queue)
        prove(self, queue, generation)

    monkeypatch.setattr(Controller, "prove_again", noting)
    return found


def connect(target, **options):
    keys = {"key_file": target.folder / "host.key", "controller_key_file": target.folder / "drive.key"}
    address = target.address(hostnqn=HOST, **keys, **options)
    return BlockNamespace(TcpTransport.connect(address, keep_alive_ms=6000, reconnect_ms=500))


def allow(folder, **options):
    target = AuthenticatedTarget(folder)
    target.new_key("host.key")
    target.new_key("drive.key")
    target.allow(HOST, key_file="host.key", controller_key_file="drive.key", **options)
    return target


@pytest.mark.parametrize("who_asks", ["target", "host"])
def test_again_while_in_use(tmp_path, proofs, who_asks):
    """No command fails, no connection is made anew: on the admin queue, which is idle, and another."""
    target = allow(tmp_path, **({"reauthenticate_seconds": 1} if who_asks == "target" else {}))
    with target.serving():
        namespace = connect(target, **({"reauthenticate": 1} if who_asks == "host" else {}))
        content = np.arange(4096 * 8, dtype=np.uint32).view(np.uint8)[: 4096 * 8]
        give_up = time.monotonic() + 60
        while len(proofs) < 4 or len(set(proofs)) < 2:
            namespace.write(0, content)
            np.testing.assert_array_equal(namespace.read(0, 8), content)
            assert time.monotonic() < give_up
        assert namespace.transport._controller.generation == 1
        namespace.close()


def test_a_proof_that_fails(tmp_path):
    """Its key was changed on one side: one line that says so."""
    target = allow(tmp_path, reauthenticate_seconds=1)
    with target.serving():
        namespace = connect(target)
        controller = namespace.transport._controller
        known = controller._credentials
        controller._credentials = Credentials(Key.generate(), known.controller_key, known.policy)
        with pytest.raises(NvmeError, match="authentication"):
            give_up = time.monotonic() + 60
            while time.monotonic() < give_up:
                namespace.read(0, 1)
                time.sleep(0.01)
        namespace.close()
