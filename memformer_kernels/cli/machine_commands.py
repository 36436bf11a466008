"""The commands about this machine and its figures: what each takes, says and returns."""

from pathlib import Path
from typing import Annotated

import typer

from memformer_kernels.cli.options import Device, JsonFile, Shapes, find_device, to_stdout, write_json


def doctor(json_file: JsonFile = None) -> None:
    """Says what is installed, what was built, which backend runs and why each other does not.

    The text goes into a bug report as it is. One line for each op and backend: `runs`, or the reason why not.

    [bold]Examples[/]

        memformer-kernels doctor
        memformer-kernels doctor --json - | jq .backends
    """
    from memformer_kernels.cli.doctor import facts, report

    found = facts()
    if not to_stdout(json_file):
        print(report(found))
    write_json(found, json_file)


def build(
    archs: Annotated[
        str | None, typer.Option(help='GPU architectures, "80;90a" by default; or MEMFORMER_KERNELS_ARCHS.')
    ] = None,
) -> None:
    """Compiles the CUDA kernels beside the package, where the installation could not.

    Seconds, with nvcc on PATH or in CUDA_HOME; neither a GPU nor torch's headers are needed. It ends with the module
    that was built and what it is for. Exit code 1 and one line that says what was missing, the compiler's own words
    before it.

    [bold]Examples[/]

        memformer-kernels build
        memformer-kernels build --archs "90a"
    """
    from memformer_kernels.cli.build import build as run_build

    run_build(archs)


def tune(
    out: Annotated[Path, typer.Option(help="Folder of the table and of the times of every candidate.")] = Path("tuned"),
    kernel: Annotated[str, typer.Option(help="Only kernels whose name holds this.")] = "",
    jobs: Annotated[int | None, typer.Option(help="Compilers at a time; all CPUs by default.")] = None,
) -> None:
    """Measures the tiles of every Triton kernel on this GPU and writes the fastest as a table.

    A few minutes. One line for each kernel and size: microseconds of the fastest, out of how many that ran, and its
    tiles. What cannot run here is named and left out. The table, sm_<architecture>.json, is used where a program asks
    for it with memformer_kernels.tiles.load_table(file): nothing is ever tuned behind your back.

    [bold]Examples[/]

        memformer-kernels tune --out tuned
        memformer-kernels tune --kernel write --out tuned
    """
    from memformer_kernels.cli.progress import bar
    from memformer_kernels.tuning import run as run_tune

    with bar("kernels") as progress:
        files = run_tune(out, kernel, jobs, progress)
    for file in files:
        print(file)


def check(
    device: Device = "auto",
    shape: Shapes = None,
    json_file: JsonFile = None,
) -> None:
    """Holds each op, backend and dtype to float64: relative errors of the output and of every gradient.

    One line for each op, backend and dtype: the largest error of the output, that of the worst gradient and its name,
    the limit for both, which follows from the dtype's rounding, and the largest error of an element as a share of twice
    its error_bound. Exit code 1 if one is above its limit, or an element above 1.

    [bold]Examples[/]

        memformer-kernels check
        memformer-kernels check --shape "B=4 H=8 M=128 L=512 D=64" --json errors.json
    """
    from memformer_kernels.cli.check import check as run_check

    if not run_check(find_device(device), shape or [], json_file):
        raise typer.Exit(1)


def bench(
    op: Annotated[str, typer.Option(help="Only ops whose name contains this: read, write, forget.")] = "",
    which: Annotated[
        str,
        typer.Option(
            "--pass",
            help="Only passes whose name contains this: forward, saving (for the backward), without (bias), backward.",
        ),
    ] = "",
    only: Annotated[
        str, typer.Option(help="Only shapes of the suite whose name contains this, such as M128 or 'H16 D64'.")
    ] = "",
    shape: Shapes = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    layout: Annotated[
        str, typer.Option(help="Of \\[B, H, L, D] inputs: contiguous, or transposed from \\[B, L, H, D].")
    ] = "contiguous",
    hidden: Annotated[
        float, typer.Option(help="Share of the read's slots, and of the write's tokens, that a mask hides; no peers.")
    ] = 0.0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer replays: medians of 7 instead of 20.")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Also time what users would pick today.")] = True,
    skip: Annotated[str, typer.Option(help="Leave out peers whose name contains this, such as Flex.")] = "",
    backend: Annotated[
        str, typer.Option(help="Of ours: auto, cuda, triton or eager. Two runs, each to its --out, can be compared.")
    ] = "auto",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="In PyTorch's deterministic mode, which refuses some peers.")
    ] = False,
    suite: Annotated[
        Path | None, typer.Option(help="A suite and the ceilings of your GPU, in the form of benchmarking/ops.toml.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for bench.json, bench.csv and the pictures; other rows there stay.")
    ] = Path("runs/bench"),
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BEFORE AFTER", help="Measure nothing: compare two files of times, row by row."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="With --compare: draw the ratios here.")] = None,
    fail_above: Annotated[
        float | None,
        typer.Option(help="With --compare: exit code 1 if a ratio is above this, or a time is lost; 1.05, say."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="With --compare: also write the ratios here; - is standard output.")
    ] = None,
) -> None:
    """Times each op on a GPU, next to what users would pick today and to the floor of the hardware.

    Without options it goes through all of the suite in minutes, and writes after every shape.

    An implementation is first held to float64, and gets no time if it is wrong. A time is device time: the median of
    replays of a CUDA graph over inputs that together exceed the L2 cache; "eager us" is a plain Python call, launches
    included. The floor is the larger of bytes over the copy rate and FLOP over the matrix rate; "ratio" is the best
    peer over ours, so that above 1 ours is faster; ~ marks a peer that does not give the same bits each time. Without
    a GPU nothing is timed, and it says what can be told.

    --compare takes two files, bench.json or those of benchmarks/rollout.py, and prints time after over time before of
    every row, the worst first: above 1 is slower.

    [bold]Examples[/]

        memformer-kernels bench --out results
        memformer-kernels bench --op read --pass backward --only M128 --quick
        memformer-kernels bench --shape "B=8 H=8 M=128 L=4096 D=64"
        memformer-kernels bench --op write --backend triton --no-peers --out triton
        memformer-kernels bench --op read --hidden 0.3 --out hidden
        memformer-kernels bench --op read --pass backward --deterministic --out deterministic
        memformer-kernels bench --compare before.json after.json --plot compare.png --fail-above 1.05
    """
    if compare is not None:
        from memformer_kernels.cli.compare import compare as run_compare

        done = run_compare(*compare, plot, fail_above, json_file)
    else:
        for name, given in (("--plot", plot), ("--fail-above", fail_above), ("--json", json_file)):
            if given is not None:
                raise typer.BadParameter(f"{name} belongs to --compare BEFORE AFTER; figures go into --out")
        from memformer_kernels.cli.bench import bench as run_bench

        done = run_bench(
            op=op,
            which=which,
            only=only,
            shapes=shape or [],
            dtype=dtype,
            layout=layout,
            hidden=hidden,
            quick=quick,
            peers=peers,
            skip=skip,
            backend=backend,
            deterministic=deterministic,
            suite_file=suite,
            out=out,
        )
    if not done:
        raise typer.Exit(1)


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of result files, such as benchmarks/results.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.md and its pictures.")] = Path("runs/report"),
) -> None:
    """Makes one Markdown page with tables and pictures of a folder of result files.

    It knows the JSON of bench, check and demo, of the scripts in benchmarks/ and of the checks on a GPU by their
    fields, whatever their names, and says which files it does not show.

    [bold]Examples[/]

        memformer-kernels report benchmarks/results
        memformer-kernels report results --out results/page
    """
    from memformer_kernels.cli.report import report as run_report

    run_report(folder, out)
