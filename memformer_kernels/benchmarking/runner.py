"""Goes through the suite on a GPU: every implementation of every call is checked, then timed.

Nothing that one implementation does ends the run: what it raised stands in its place in the report. Only a device that
is lost does, and then the report holds what was measured before.
"""

import contextlib
import gc
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch

from memformer_kernels.benchmarking import inputs, timing
from memformer_kernels.benchmarking.measure import (
    MOST_BYTES,
    DeviceLost,
    InputSet,
    References,
    Settings,
    check_device,
    host_time,
    measure,
)
from memformer_kernels.benchmarking.peers import OURS, PEERS, Implementation, backend_of_ours, ours
from memformer_kernels.benchmarking.suite import Shape, Suite, work

FEWEST_SETS = 4
L2_SIZES = 3  # the input sets together are this many times the L2


def run(
    suite: Suite,
    chosen: list[tuple[Shape, tuple[str, ...]]],
    settings: Settings,
    progress: Callable[[str], None],
    save: Callable[[dict], None],
) -> dict:
    """Measures the chosen shapes and passes; `save` gets the report so far after each shape."""
    started = time.perf_counter()
    report = {
        "dtype": str(settings.dtype).removeprefix("torch."),
        "layout": settings.layout,
        "hidden": settings.hidden,
        "deterministic": settings.deterministic,
        "rates": asdict(suite.rates),
    }
    report |= {"rows": [], "overhead": [], "stopped": None}
    with _configured(settings.deterministic), torch.cuda.stream(torch.cuda.Stream()):
        try:
            report["machine"] = machine()
            progress(describe(report["machine"]))
            for shape, passes in chosen:
                _measure_shape(suite, shape, passes, settings, progress, report["rows"])
                report["seconds"] = round(time.perf_counter() - started, 1)
                save(report)
                gc.collect()
                torch.cuda.empty_cache()
            for op in dict.fromkeys(shape.op for shape, _ in chosen):
                report["overhead"] += _measure_overhead(suite, op, settings, progress)
        except DeviceLost as error:
            report["stopped"] = str(error)
            progress(f"stopped: {error}")
    report["seconds"] = round(time.perf_counter() - started, 1)
    save(report)
    return report


def machine() -> dict:
    """The GPU, what runs on it, and the rate at which it copies."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton_version,
        "python": platform.python_version(),
        "copy_rate": timing.copy_rate(),  # bytes a second
    }


def describe(machine: dict) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "cuda", "cudnn", "python"))
    return f"{machine['gpu']}, copy {machine['copy_rate'] / 1e12:.2f} TB/s, {versions}"


@contextlib.contextmanager
def _configured(deterministic: bool = False) -> Iterator[None]:
    """What compiled peers need: no limit that makes them run unfused, and backwards that can run again.

    In PyTorch's deterministic mode new tensors are left as they are: filling them would be timed with every call.
    """
    import torch._dynamo.config
    import torch._functorch.config
    import torch.utils.deterministic

    dynamo, functorch = torch._dynamo.config, torch._functorch.config
    mode = torch.are_deterministic_algorithms_enabled()
    wanted = [
        (dynamo, "recompile_limit", 256),
        (dynamo, "cache_size_limit", 256),  # its older name
        (dynamo, "accumulated_recompile_limit", 100_000),
        (functorch, "donated_buffer", False),
        (torch.utils.deterministic, "fill_uninitialized_memory", False),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in wanted if hasattr(module, name)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forced backends that cannot run say why in many; the error is enough
        warnings.filterwarnings("error", message=".*flex_attention called without torch.compile.*")
        try:
            for module, name, value in wanted:
                if hasattr(module, name):
                    setattr(module, name, value)
            torch.use_deterministic_algorithms(deterministic or mode)
            yield
        finally:
            torch.use_deterministic_algorithms(mode)
            for module, name, value in before:
                setattr(module, name, value)


def _measure_shape(
    suite: Suite, shape: Shape, passes: tuple[str, ...], settings: Settings, progress, all_rows: list[dict]
) -> None:
    """Adds a row for each pass, and fills it in."""
    rows = {which: _empty_row(suite, shape, which, settings) for which in passes}
    all_rows += rows.values()
    try:
        sets = _input_sets(suite, shape, settings)
        references = References(sets[0], shape)
        backend = backend_of_ours(sets[0][0], settings.backend)
        for implementation in _implementations(shape.op, settings):
            taken = [which for which in passes if which in implementation.passes]
            for which, figures in measure(implementation, shape, taken, sets, references, settings):
                rows[which] |= {"backend": backend}
                rows[which]["results"][implementation.name] = figures
                progress(_progress_line(shape, which, implementation.name, figures))
    except DeviceLost:
        raise
    except Exception as error:  # the inputs do not fit, say
        check_device(error)
        for which in passes:
            rows[which]["problem"] = timing.one_line(error)
            progress(f"{shape.op} {which} {shape.name}: {rows[which]['problem']}")
    finally:
        for row in rows.values():
            compare(row)


def _implementations(op: str, settings: Settings) -> list[Implementation]:
    """Ours, and the chosen peers."""
    peers = PEERS[op] if settings.peers and not settings.hidden else []  # each has its own form of masks
    chosen = [peer for peer in peers if not settings.skip or settings.skip not in peer.name]
    return [ours(op, _device(), settings.backend), *chosen]


def _empty_row(suite: Suite, shape: Shape, which: str, settings: Settings) -> dict:
    needed = work(shape, which, settings.dtype.itemsize)
    row = {"op": shape.op, "pass": which, "shape": shape.name, "group": shape.group, "sizes": asdict(shape)}
    for name in ("op", "group"):
        del row["sizes"][name]
    return (
        row
        | asdict(needed)
        | suite.rates.floor(needed, settings.dtype)
        | {"backend": None, "results": {}, "problem": None}
    )


def compare(row: dict) -> None:
    """Adds to a row the best of the peers that were right, ours over it, and the share of the floor that ours has."""
    times = {name: figures["ms"] for name, figures in row["results"].items() if figures["ms"] is not None}
    mine = times.pop(OURS, None)
    best = min(times, key=times.get, default=None)
    row["best_peer"] = best
    row["ratio"] = times[best] / mine if mine and best else None
    row["share_of_floor"] = row["floor_ms"] / mine if mine else None


def _input_sets(suite: Suite, shape: Shape, settings: Settings) -> list[InputSet]:
    """At least four, and so many that their inputs are three times the L2; fewer where memory ends."""
    make = _make(suite, shape, settings)
    case, grad = first = make(seed=0)
    l2 = torch.cuda.get_device_properties(grad.device).L2_cache_size
    count = max(FEWEST_SETS, -(-L2_SIZES * l2 // inputs.bytes_of(case)))
    count = max(1, min(count, int(MOST_BYTES // (inputs.bytes_of(case) + grad.nbytes))))
    return [first, *(make(seed=seed) for seed in range(1, count))]


def _progress_line(shape: Shape, which: str, name: str, figures: dict) -> str:
    start = f"{shape.op} {which:20} {shape.name:27} {name:17}"
    if figures["ms"] is None:
        return f"{start} {figures['problem']}"
    events = "" if figures["method"] == "graph" else f" ({figures['method']}: {figures['note']})"
    line = f"{start} {figures['ms']:8.4f} ms{events}  eager {figures['wall_us']:7.0f} us  error {figures['error']:.1e}"
    return line if figures["same_bits"] else f"{line}  not the same bits each time"


def _measure_overhead(suite: Suite, op: str, settings: Settings, progress) -> list[dict]:
    """Host time of a call so small that the device never makes the host wait.

    Compiled peers are left out: each would be compiled once more.
    """
    shape = suite.overhead_shape(op)
    first = _make(suite, shape, settings)(seed=0)
    rows = []
    for implementation in (i for i in _implementations(op, settings) if not i.compiled):
        figures = host_time(implementation, shape, first)
        rows.append({"op": op, "shape": shape.name, "implementation": implementation.name, **figures})
        says = figures["problem"]
        if not says:
            says = f"{figures['forward_us']:.1f} us forward, {figures['forward_and_backward_us']:.1f} us with backward"
        progress(f"{op} host time a call, {shape.name}, {implementation.name}: {says}")
    return rows


def _make(suite: Suite, shape: Shape, settings: Settings) -> Callable[..., InputSet]:
    options = {"layout": settings.layout, "temperature": suite.temperature, "hidden": settings.hidden}
    return partial(inputs.make_input, shape, settings.dtype, _device(), **options)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
