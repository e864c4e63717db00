"""The event engine: tasks that wait for each other and queue for resources.

A resource serves one task at a time, first come, first served, as the queues of ftl/virtual_clock.py do; a task
without a resource takes its time beside everything. A task is asked for when all that it comes after has ended.

A stream is a chain of tasks that work on the same bytes window by window: flash, then a link, then an
accelerator. A stage is asked for when the stage before has done its first window, takes its resource for its
own seconds, and ends no sooner than one window after the stage before. So the slowest stage sets the pace,
filling and draining take a window each, and streams of many drives share a link fairly, without an event for
each window.

What a task waited for last is its cause. Following causes back from the last task gives the critical path,
whose pieces add up to the whole time.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum


class Moment(Enum):
    """Of a task, when others go on: those after it, the next in the queue, the next stage of a stream."""

    END = 0
    RELEASE = 1
    WINDOW = 2


END, RELEASE, WINDOW = Moment


class Resource:
    """name: as in Result.utilisation"""

    __slots__ = ("busy", "current", "name", "queue")

    def __init__(self, name: str):
        self.name = name
        self.busy = 0.0
        self.current: Task | None = None
        self.queue: deque[Task] = deque()


class Task:
    """seconds: of service; category: of the breakdown; window: share of a stream that a window is; stage: the
    next of the stream, `leader` the one before; start, end: when it was served"""

    __slots__ = (
        "category", "cause", "end", "followers", "leader", "moment", "resource", "seconds", "stage", "start",
        "waits", "window",
    )  # fmt: skip

    def __init__(self, resource: Resource | None, seconds: float, category: str, window: float = 1.0):
        self.resource, self.seconds, self.category, self.window = resource, seconds, category, window
        self.waits = 0
        self.followers: list[Task] = []
        self.leader: Task | None = None
        self.stage: Task | None = None
        self.cause: Task | None = None
        self.moment = END  # of the cause
        self.start = self.end = -1.0


@dataclass
class Run:
    """seconds: until the last task ended; busy: seconds by resource; breakdown: by category, adding up to
    seconds"""

    seconds: float
    busy: dict[str, float] = field(default_factory=dict)
    breakdown: dict[str, float] = field(default_factory=dict)


class Simulation:
    """Tasks are added in any order, after those that they wait for; then run once."""

    def __init__(self):
        self._resources: dict[str, Resource] = {}
        self._tasks: list[Task] = []

    def _resource(self, name: str | None) -> Resource | None:
        if name is None:
            return None
        found = self._resources.get(name)
        if found is None:
            found = self._resources[name] = Resource(name)
        return found

    def task(
        self, resource: str | None, seconds: float, category: str, after: Iterable[Task | None] = ()
    ) -> Task:
        """after: None among them is nothing to wait for"""
        return self._add(Task(self._resource(resource), seconds, category), after)

    def stream(
        self, stages: Sequence[tuple[str, float, str]], window: float, after: Iterable[Task | None] = ()
    ) -> Task:
        """Its last stage. stages: (resource, seconds, category); window: share of the bytes, above 0 to 1"""
        leader = self._add(Task(self._resource(stages[0][0]), *stages[0][1:], window), after)
        for resource, seconds, category in stages[1:]:
            stage = self._add(Task(self._resource(resource), seconds, category, window), ())
            stage.leader, leader.stage, stage.waits = leader, stage, 1
            leader = stage
        return leader

    def _add(self, made: Task, after: Iterable[Task | None]) -> Task:
        for before in after:
            if before is not None:
                before.followers.append(made)
                made.waits += 1
        self._tasks.append(made)
        return made

    def run(self, last: Task | None = None) -> Run:
        """Until all tasks have ended. seconds and breakdown are up to the end of `last`, by default of all:
        writes behind may go on beyond the step that asked for them."""
        events: list[tuple[float, int, Moment, Task]] = []
        number = 0
        now = 0.0

        def happens(when: float, moment: Moment, task: Task) -> None:
            nonlocal number
            number += 1
            heapq.heappush(events, (when, number, moment, task))

        def start(task: Task) -> None:
            task.start, task.end = now, now + task.seconds
            if task.leader is not None:
                task.end = max(task.end, task.leader.end + task.window * task.seconds)
            if task.resource is not None:
                task.resource.current = task
                task.resource.busy += task.seconds
                happens(now + task.seconds, RELEASE, task)
            happens(task.end, END, task)
            if task.stage is not None:
                happens(now + task.window * task.seconds, WINDOW, task)

        def ask(task: Task, cause: Task | None, moment: Moment) -> None:
            task.cause, task.moment = cause, moment
            resource = task.resource
            if resource is None or resource.current is None:
                start(task)
            else:
                resource.queue.append(task)

        for task in self._tasks:
            if task.waits == 0:
                ask(task, None, END)
        while events:
            now, _, moment, task = heapq.heappop(events)
            if moment is END:
                for follower in task.followers:
                    follower.waits -= 1
                    if follower.waits == 0:
                        ask(follower, task, END)
            elif moment is WINDOW:
                ask(task.stage, task, WINDOW)
            else:
                resource = task.resource
                resource.current = None
                if resource.queue:
                    following = resource.queue.popleft()
                    following.cause, following.moment = task, RELEASE
                    start(following)
        assert all(task.start >= 0 for task in self._tasks), "tasks wait for each other in a circle"
        last = last or max(self._tasks, key=lambda one: one.end, default=None)
        busy = {resource.name: resource.busy for resource in self._resources.values()}
        return Run(last.end if last else 0.0, busy, _critical_path(last))


def _critical_path(last: Task | None) -> dict[str, float]:
    """Seconds by category, from the last task's end back to the beginning."""
    found: dict[str, float] = {}
    task, moment = last, END
    while task is not None:
        if moment is END and task.end > task.start + task.seconds:  # it waited for the stage before
            seconds, following = task.end - task.leader.end, (task.leader, END)
        else:
            seconds = task.window * task.seconds if moment is WINDOW else task.seconds
            following = task.cause, task.moment
        found[task.category] = found.get(task.category, 0.0) + seconds
        task, moment = following
    return found
