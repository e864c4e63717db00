"""The event engine against what can be worked out on paper."""

import pytest

from machine_model.events import Simulation


def test_tasks_queue_for_a_resource_in_the_order_they_were_asked():
    """Everything else rests on it."""
    sim = Simulation()
    first = sim.task("link", 2.0, "a")
    second = sim.task("link", 3.0, "b")
    after = sim.task("gpu", 1.0, "c", [first])
    run = sim.run()
    assert (first.start, second.start, after.start) == (0.0, 2.0, 2.0)
    assert run.seconds == 5.0
    assert run.busy == {"link": 5.0, "gpu": 1.0}
    assert run.breakdown == {"a": 2.0, "b": 3.0}


def test_a_task_waits_for_all_before_it():
    """A layer ends with its slowest drive."""
    sim = Simulation()
    drives = [sim.task(f"drive{i}", seconds, "flash") for i, seconds in enumerate((1.0, 4.0, 2.0))]
    sim.task("gpu", 1.0, "gpu", drives)
    run = sim.run()
    assert run.seconds == 5.0
    assert run.breakdown == {"gpu": 1.0, "flash": 4.0}


@pytest.mark.parametrize(
    ("flash", "kernels", "seconds"),
    [
        (10.0, 4.0, 10.0 + 0.4),  # flash is slower: all of it, and the last window computed
        (4.0, 10.0, 0.4 + 10.0),  # the accelerator is: the first window read, and all of it
        (5.0, 5.0, 5.5),
    ],
)
def test_a_stream_is_as_slow_as_its_slowest_stage(flash, kernels, seconds):
    """Pipelining is what a drive gains by."""
    sim = Simulation()
    sim.stream([("flash", flash, "flash"), ("kernels", kernels, "kernels")], 0.1)
    run = sim.run()
    assert run.seconds == pytest.approx(seconds)
    assert sum(run.breakdown.values()) == pytest.approx(run.seconds)
    assert run.busy == {"flash": flash, "kernels": kernels}


def test_a_window_of_everything_is_no_pipeline():
    """Small commands read, then compute."""
    sim = Simulation()
    sim.stream([("flash", 3.0, "flash"), ("kernels", 2.0, "kernels")], 1.0)
    assert sim.run().seconds == 5.0


@pytest.mark.parametrize(("link", "seconds"), [(0.5, 4.0 + 0.01 * 0.5), (3.0, 0.04 + 4 * 3.0)])
def test_streams_of_drives_share_a_link(link, seconds):
    """Either the drives are the limit, all at once, or their link, one after the other."""
    sim = Simulation()
    ends = [sim.stream([(f"drive{i}", 4.0, "flash"), ("link", link, "link")], 0.01) for i in range(4)]
    sim.task(None, 0.0, "gpu", ends)
    run = sim.run()
    assert run.seconds == pytest.approx(seconds, rel=0.01)
    assert run.busy["link"] == pytest.approx(4 * link)
    assert sum(run.breakdown.values()) == pytest.approx(run.seconds)


def test_what_goes_on_behind_is_not_waited_for():
    """A step ends before its spills do."""
    sim = Simulation()
    first = sim.task("gpu", 1.0, "gpu")
    sim.task("flash", 9.0, "write", [first])
    last = sim.task("gpu", 1.0, "gpu", [first])
    run = sim.run(last)
    assert run.seconds == 2.0
    assert run.busy["flash"] == 9.0


def test_a_circle_is_our_own_fault():
    """It would be a run that silently leaves tasks out."""
    sim = Simulation()
    one = sim.task("gpu", 1.0, "gpu")
    two = sim.task("gpu", 1.0, "gpu", [one])
    two.followers.append(one)
    one.waits += 1
    with pytest.raises(AssertionError, match="circle"):
        sim.run()
