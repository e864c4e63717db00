"""A trace as Chrome's JSON, which ui.perfetto.dev and chrome://tracing open.

Each layer is shown as a process of its own, from the host down to the kernels, with the threads that worked
there below it: so a request is seen on its way down. A span's request is among its arguments.
"""

from collections.abc import Iterable

from spdk_glue.request_id import request_name
from spdk_glue.trace import Span

LAYERS = ("client", "host", "queue", "drive", "ftl", "media", "kernel")
TITLES = {"ftl": "FTL", "queue": "queues (NVMe, workers)", "kernel": "kernels"}
NS_PER_US = 1000


def span_dicts(spans: Iterable[Span]) -> list[dict]:
    """Spans as JSON has them, to be sent to another process: their requests by name."""
    return [{**span._asdict(), "request": request_name(span.request)} for span in spans]


def chrome_trace(spans: list[dict], **facts) -> dict:
    """spans: of span_dicts, of any processes of one host; facts: of what was traced, for `otherData`."""
    tracks: dict[tuple[str, str], int] = {}
    for span in sorted(spans, key=lambda span: span["thread"]):
        tracks.setdefault((span["layer"], span["thread"]), len(tracks) + 1)
    events = [*_names(tracks)]
    begin = min((span["start_ns"] for span in spans), default=0)
    for number, span in enumerate(sorted(spans, key=lambda span: (span["start_ns"], -span["stop_ns"]))):
        events += _events(number, span, tracks[span["layer"], span["thread"]], begin)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": facts}


def _process(layer: str) -> int:
    return LAYERS.index(layer) + 1


def _names(tracks: dict[tuple[str, str], int]) -> Iterable[dict]:
    for layer in dict.fromkeys(layer for layer, _ in tracks):
        process = {"ph": "M", "pid": _process(layer), "tid": 0}
        yield {**process, "name": "process_name", "args": {"name": TITLES.get(layer, layer)}}
        yield {**process, "name": "process_sort_index", "args": {"sort_index": _process(layer)}}
    for (layer, thread), track in tracks.items():
        yield {
            "ph": "M",
            "pid": _process(layer),
            "tid": track,
            "name": "thread_name",
            "args": {"name": thread},
        }


def _events(number: int, span: dict, track: int, begin: int) -> Iterable[dict]:
    """One complete event; of a wait, which others may overlap, a pair that viewers give a track of its own."""
    common = {
        "name": span["name"],
        "cat": span["layer"],
        "pid": _process(span["layer"]),
        "tid": track,
        "ts": (span["start_ns"] - begin) / NS_PER_US,
    }
    arguments = {"request": span["request"], **(span["note"] or {})}
    duration = (span["stop_ns"] - span["start_ns"]) / NS_PER_US
    if not span["is_wait"]:
        return [{**common, "ph": "X", "dur": duration, "args": arguments}]
    wait = {**common, "id2": {"local": number}}  # within its layer
    return [{**wait, "ph": "b", "args": arguments}, {**wait, "ph": "e", "ts": common["ts"] + duration}]
