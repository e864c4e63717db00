"""The target is killed and comes back, under SPDK's initiator and ours: what is repeated, what is reported."""

import os
import signal
import threading

import numpy as np
import pytest

from spdk_glue import dma
from spdk_glue.fabrics.initiator.queue import Queue
from spdk_glue.namespace import BlockNamespace
from spdk_glue.pyspdk import controller
from spdk_glue.status import ConnectionLost
from spdk_glue.transports.spdk import SpdkTransport
from spdk_glue.transports.tcp import TcpTransport

BLOCK = 4096
AWAY = r"0\.5 s: see whether the target runs"


def connect(target, initiator, reconnect_ms=30_000):
    """initiator: "spdk", or "tcp" with options of its address."""
    if initiator == "spdk":
        return BlockNamespace(
            SpdkTransport(controller.Controller(target.transport_id, reconnect_ms=reconnect_ms), 1)
        )
    address = target.address + initiator.removeprefix("tcp")
    return BlockNamespace(TcpTransport.connect(address, reconnect_ms=reconnect_ms))


@pytest.fixture(params=["spdk", "tcp"])
def initiator(request):
    return request.param


def content(num_blocks, seed=0):
    data = dma.allocate(num_blocks * BLOCK)
    data[:] = np.random.default_rng(seed).integers(0, 256, data.size, np.uint8)
    return data


def test_reads_go_on(target, initiator):
    """Killed between two commands: reads are sent again."""
    namespace = connect(target, initiator)
    data = content(4000)
    namespace.write(0, data)
    namespace.flush()
    for _ in range(2):
        target.kill()
        target.start()
        np.testing.assert_array_equal(namespace.read(0, 4000), data)
    namespace.close()


@pytest.mark.parametrize(
    "initiator", ["spdk", "tcp", "tcp?header-digest=on", "tcp?header-digest=on&data-digest=on"]
)
def test_killed_under_load(target, initiator):
    """Each of several threads has a queue pair to reconnect; every byte is right."""
    namespace = connect(target, initiator)
    data = content(3000)
    namespace.write(0, data)
    namespace.flush()
    stop, failures, rounds = threading.Event(), [], []

    def work():
        try:
            while not stop.is_set():
                np.testing.assert_array_equal(namespace.read(0, 3000), data)
                rounds.append(1)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        target.kill()
        target.start()
        before = len(rounds)
        while len(rounds) < before + 6 and not failures:
            stop.wait(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    namespace.flush()
    namespace.close()


def test_writes_are_repeated_and_flush_tells(target, initiator):
    """Writes complete, but after a loss no flush may promise what came before it."""
    namespace = connect(target, initiator)
    namespace.write(0, content(10))
    target.kill()
    target.start()
    data = content(10, seed=1)
    namespace.write(100, data)  # interrupted or not, it is whole
    np.testing.assert_array_equal(namespace.read(100, 10), data)
    for _ in range(2):  # for as long as this connection is used
        with pytest.raises(ConnectionLost, match="not flushed"):
            namespace.flush()
    namespace.close()
    namespace = connect(target, initiator)
    namespace.flush()
    namespace.close()


def test_target_stays_away(target, initiator):
    """One clear error in bounded time, for commands and for admin commands; then nothing hangs."""
    namespace = connect(target, initiator, reconnect_ms=500)
    namespace.read(0, 1)
    target.kill()
    with pytest.raises(ConnectionLost, match=AWAY):
        namespace.read(0, 1)
    with pytest.raises(ConnectionLost):
        namespace.flush()
    with pytest.raises(ConnectionLost):
        namespace.log_page(2, np.dtype("V512"))
    namespace.close()


def test_stopped_target_is_given_up(target, initiator, monkeypatch):
    """A target that takes commands and does not answer."""
    monkeypatch.setattr(controller, "COMMAND_TIMEOUT_MS", 500)
    monkeypatch.setattr(Queue.transfer, "__defaults__", (None, 500))
    namespace = connect(target, initiator, reconnect_ms=1000)
    namespace.read(0, 1)
    os.kill(target.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ConnectionLost, match="see whether the target runs"):
            namespace.read(0, 1)
    finally:
        os.kill(target.process.pid, signal.SIGCONT)
    namespace.close()
