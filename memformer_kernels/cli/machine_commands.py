"""The commands about this machine: what each takes, says and returns."""

from pathlib import Path
from typing import Annotated

import typer

from memformer_kernels.cli.options import find_device


def doctor() -> None:
    """What is installed, what was built, which backend runs and why each other does not."""
    from memformer_kernels.cli.doctor import report

    print(report())


def tune(
    out: Annotated[Path, typer.Option(help="Folder of the table and of the times of every candidate.")] = Path("tuned"),
    kernel: Annotated[str, typer.Option(help="Only kernels whose name holds this.")] = "",
    jobs: Annotated[int | None, typer.Option(help="Compilers at a time; all CPUs by default.")] = None,
) -> None:
    """Measures the tiles of every Triton kernel on this GPU and writes the fastest as a table.

    A few minutes. Your own table is used where a program asks for it: memformer_kernels.tiles.load_table(file).
    """
    from memformer_kernels.tuning import run as run_tune

    for file in run_tune(out, kernel, jobs):
        print(file)


def check(
    device: Annotated[str, typer.Option(help="Where to run; by default a GPU if there is one.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Each op, backend and dtype against float64: relative errors of the output and of every gradient.

    Exit code 1 if one is above its limit.
    """
    from memformer_kernels.cli.check import check as run_check

    if not run_check(find_device(device), json_file):
        raise typer.Exit(1)


def bench(
    op: Annotated[str, typer.Option(help="Only ops whose name contains this: read, write, forget.")] = "",
    which: Annotated[
        str, typer.Option("--pass", help="Only passes whose name contains this: forward, saving, without, backward.")
    ] = "",
    shape: Annotated[str, typer.Option(help="Only shapes whose name contains this, such as M128 or 'H16 D64'.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    layout: Annotated[
        str, typer.Option(help="Of \\[B, H, L, D] inputs: contiguous, or transposed from \\[B, L, H, D].")
    ] = "contiguous",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer replays: medians of 7 instead of 20.")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Also time what users would pick today.")] = True,
    skip: Annotated[str, typer.Option(help="Leave out peers whose name contains this, such as Flex.")] = "",
    suite: Annotated[Path | None, typer.Option(help="Another list of shapes; see benchmarking/ops.toml.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.csv and the pictures.")] = Path("runs/bench"),
) -> None:
    """Times each op on a GPU, next to what users would pick today and to the floor of the hardware.

    [bold]memformer-kernels bench[/] goes through all of it in minutes, and writes after every shape;
    [bold]memformer-kernels bench --op read --pass backward --shape M128 --quick[/] takes seconds.

    An implementation is first held to float64, and gets no time if it is wrong. A time is device time: the median of
    replays of a CUDA graph over inputs that together exceed the L2 cache; "eager us" is a plain Python call, launches
    included. The floor is the larger of bytes over the copy rate and FLOP over the matrix rate. Without a GPU nothing
    is timed, and it says what can be told.
    """
    from memformer_kernels.cli.bench import bench as run_bench

    done = run_bench(
        op=op,
        which=which,
        shape=shape,
        dtype=dtype,
        layout=layout,
        quick=quick,
        peers=peers,
        skip=skip,
        suite_file=suite,
        out=out,
    )
    if not done:
        raise typer.Exit(1)
