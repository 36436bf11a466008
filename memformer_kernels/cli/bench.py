"""`bench`: the suite on a GPU, with its tables, files and pictures; on a CPU, what can be said without one."""

import os
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console

from memformer_kernels import testing
from memformer_kernels.backend import BACKENDS
from memformer_kernels.benchmarking import inputs, plots, report, runner, suite, targets
from memformer_kernels.benchmarking.measure import Settings
from memformer_kernels.benchmarking.peers import PEERS, not_compiled, ours
from memformer_kernels.cli.progress import bar

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
QUICK_REPLAYS = 7
NARROWEST = 150  # columns that the table takes where the terminal does not say


def bench(
    *,
    op: str,
    which: str,
    only: str,
    shapes: list[str],
    dtype: str,
    layout: str,
    hidden: float,
    quick: bool,
    peers: bool,
    skip: str,
    backend: str,
    deterministic: bool,
    suite_file: Path | None,
    out: Path,
) -> bool:
    """False when the run had to stop before its end."""
    if dtype not in DTYPES:
        raise ValueError(f"bench: --dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if layout not in inputs.LAYOUTS:
        raise ValueError(f"bench: --layout must be one of {', '.join(inputs.LAYOUTS)}, got {layout!r}")
    if not 0 <= hidden < 1:
        raise ValueError(f"bench: --hidden must be from 0 to below 1, got {hidden:g}")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"bench: --backend must be one of {', '.join(('auto', *BACKENDS))}, got {backend!r}")
    loaded = suite.load(suite_file)
    if shapes:
        loaded = loaded.of_shapes(shapes)
    chosen = loaded.select(op, which, only)
    if not torch.cuda.is_available():
        _say_what_a_cpu_can(loaded, chosen)
        return True
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch refuses matrix products
    out.mkdir(parents=True, exist_ok=True)
    replays = QUICK_REPLAYS if quick else Settings.replays
    settings = Settings(DTYPES[dtype], layout, hidden, replays, peers, skip, backend, deterministic)
    command = shlex.join(["memformer-kernels", *sys.argv[1:]])
    together = {}

    total = sum(len(passes) for _, passes in chosen)
    with bar("shapes") as progress:

        def save(measured: dict) -> None:
            # read anew each time: a run on another GPU may write there too
            together.update(report.joined(report.read(out), {"command": command, **measured}))
            report.write_json({**together, "summary": targets.summarise(together)}, out)
            report.write_csv(together, out)
            progress(len(measured["rows"]) / total)

        measured = runner.run(loaded, chosen, settings, lambda text: print(text, flush=True), save)
    console = Console()
    report.print_report(
        measured, targets.summarise(measured), Console(width=max(console.width, NARROWEST), highlight=False)
    )
    drawn = plots.draw(together, out)
    written = (out / "bench.json", out / "bench.csv", *drawn)
    print(f"{measured['seconds']:.0f} s; written: {', '.join(map(str, written))}")
    return measured["stopped"] is None


def _say_what_a_cpu_can(loaded: suite.Suite, chosen: list) -> None:
    """No time at all: one of a CPU would say nothing of the kernels."""
    print("No GPU that torch can use. Not measured here: device times, host times, the copy rate; nothing is written.")
    print("Told here: what a GPU would measure, and that ours and the peers that a CPU has compute the same thing.\n")
    for shape, passes in chosen:
        traffic = ", ".join(_work(shape, which) for which in passes)
        print(f"{shape.op:14} {shape.name:28} {traffic}")
    print()
    for op in dict.fromkeys(shape.op for shape, _ in chosen):
        for name, says in check_on_cpu(op, loaded).items():
            print(f"{op:14} {name:17} {says}")


def _work(shape: suite.Shape, which: str) -> str:
    needed = suite.work(shape, which, element=2)
    return f"{which} {needed.bytes / 1e6:.0f} MB {needed.flop / 1e9:.0f} GFLOP"


def check_on_cpu(op: str, loaded: suite.Suite) -> dict[str, str]:
    """For each implementation its largest error against float64 at a small shape in float32, or why there is none."""
    device = torch.device("cpu")
    shape = loaded.overhead_shape(op)
    case, grad = inputs.make_input(
        shape, torch.float32, device, layout="contiguous", temperature=loaded.temperature, seed=0
    )
    expected = inputs.reference(case, grad, shape)
    says = {}
    for implementation in (ours(op, device), *PEERS[op]):
        forward, gradients = implementation.cpu
        if not gradients:
            part = "gradients" if forward else "all of it"
            says[implementation.name] = f"needs a GPU for {part}"
            continue
        function = implementation.make(shape, device, not_compiled)
        with implementation.context():
            errors = inputs.errors(testing.run(case, grad_output=grad, function=function), expected)
        says[implementation.name] = f"largest error {max(errors.values()):.1e} against float64, in float32"
    return says
