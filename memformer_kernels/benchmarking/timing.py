"""Times on a GPU. Everything here runs on the current stream, which must not be the default one: graphs need that."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

GRAPH_MS = 2.0  # device time aimed at in a graph: the gap of a few microseconds between replays is then under 1 %
MOST_CALLS = 256  # in a graph
REPLAYS_MS = 250.0  # device time of all replays, which calls of many milliseconds would exceed
FEWEST_REPLAYS = 5
COPY_ELEMENTS = 2**30

Calls = list[Callable[[], object]]  # one over each input set


@dataclass(frozen=True)
class Timing:
    """ms: median device milliseconds a call. method: "graph", or "events" where a graph could not be captured."""

    ms: float
    method: str
    calls: int
    note: str | None = None


def device_time(calls: Calls, replays: int = 20) -> Timing:
    """Device time of a call, from replays of a graph that holds the calls in turn.

    The results of one turn stay alive while the next is captured, so that outputs rotate as inputs do and a write
    never finds its lines in the L2. Replays are queued without waiting: the device goes from one to the next.
    """
    estimate = estimate_ms(calls)
    # the estimate includes the host's time where the device waits for it, so twice the calls it asks for
    wanted = min(MOST_CALLS, 2 * GRAPH_MS / max(estimate, 1e-3))
    turns = max(1, round(wanted / len(calls)))
    try:
        graph, kept = _capture(calls, turns)
    except Exception as error:
        torch.cuda.synchronize()  # raises where the device is lost, not only the capture
        cause = error.__context__ or error  # the end of a broken capture raises too
        turns = max(1, round(GRAPH_MS / max(estimate, 1e-3) / len(calls)))
        times = _between_events(lambda: _turn(calls, turns), replays)
        return Timing(statistics.median(times) / (len(calls) * turns), "events", len(calls) * turns, one_line(cause))
    long = estimate * len(calls) * turns  # milliseconds
    times = _between_events(graph.replay, max(min(replays, FEWEST_REPLAYS), min(replays, round(REPLAYS_MS / long))))
    del graph, kept
    return Timing(statistics.median(times) / (len(calls) * turns), "graph", len(calls) * turns)


def _capture(calls: Calls, turns: int) -> tuple[torch.cuda.CUDAGraph, list]:
    graph, kept = torch.cuda.CUDAGraph(), [None] * len(calls)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(turns):
            for i, call in enumerate(calls):
                kept[i] = call()
    return graph, kept


def _turn(calls: Calls, turns: int = 1) -> None:
    for _ in range(turns):
        for call in calls:
            call()


def _between_events(run: Callable[[], object], repeats: int, warm_up: int = 2) -> list[float]:
    """Milliseconds of each of `repeats` runs, queued one behind the other after `warm_up` more."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(warm_up + repeats + 1)]
    for event in events[:-1]:
        event.record()
        run()
    events[-1].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return times[warm_up:]


def estimate_ms(calls: Calls) -> float:
    """Milliseconds a call, launches by the host included; every call has run twice after it."""
    return min(_between_events(lambda: _turn(calls), 1, warm_up=1)) / len(calls)


def eager_time(calls: Calls, repeats: int = 3) -> dict[str, float]:
    """Microseconds a call as a loop in Python sees it: `host_us` until it returns, `wall_us` until it is done."""
    count = min(50, max(5, round(20 / max(estimate_ms(calls), 1e-3))))
    host, wall = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        host.append((queued - start) / count * 1e6)
        wall.append((time.perf_counter() - start) / count * 1e6)
    return {"host_us": statistics.median(host), "wall_us": statistics.median(wall)}


def host_us(call: Callable[[], object], count: int = 100, repeats: int = 7) -> float:
    """Microseconds until a call returns, the device not waited for; median of `repeats` means over `count`."""
    for _ in range(20):
        call()
    means = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        means.append((time.perf_counter() - start) / count * 1e6)
    torch.cuda.synchronize()
    return statistics.median(means)


def copy_rate() -> float:
    """Bytes read plus written a second by a kernel that only moves memory, 2 GiB of it."""
    source = torch.zeros(COPY_ELEMENTS, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)  # neg, not copy_: a graph would give a copy to the slower copy engine
    return 2 * source.nbytes / device_time([lambda: torch.neg(source, out=target)]).ms * 1e3


def one_line(error: BaseException, most: int = 240) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= most else text[: most - 3] + "..."
