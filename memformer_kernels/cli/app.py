"""The commands: what each takes, says and returns. The work is done in the modules beside this one."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Memformer: train, generate, check, and say what runs on this machine.",
)
errors = Console(stderr=True)


def run() -> None:
    """Runs a command; what a user can mend is one line and an exit code, not a traceback."""
    from memformer_kernels.training.run import Interrupted

    try:
        app()
    except Interrupted as stop:
        if int(os.environ.get("RANK", 0)) == 0:  # of torchrun's ranks, which stop together, one says so
            errors.print(f"interrupted: {stop}; go on with --resume", highlight=False)
        sys.exit(130)
    except KeyboardInterrupt:
        errors.print("interrupted", highlight=False)
        sys.exit(130)
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def doctor() -> None:
    """What is installed, what was built, which backend runs and why each other does not."""
    from memformer_kernels.cli.doctor import report

    print(report())


@app.command()
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


@app.command()
def check(
    device: Annotated[str, typer.Option(help="Where to run; by default a GPU if there is one.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Each op, backend and dtype against float64: relative errors of the output and of every gradient.

    Exit code 1 if one is above its limit.
    """
    from memformer_kernels.cli.check import check as run_check

    if not run_check(_device(device), json_file):
        raise typer.Exit(1)


@app.command()
def train(
    context: typer.Context,
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Text files and folders; by default this Python's standard library.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="text, or recall: show a symbol in the first segment, ask in the last.")
    ] = "text",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/<task>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, bit for bit as if never stopped.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also train a twin without memory, on the same data and steps.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after this long.")] = None,
    batch: Annotated[int | None, typer.Option(help="Lanes of text read side by side, by all ranks together.")] = None,
    horizons: Annotated[
        str | None, typer.Option(help="Segments a rollout; 2,4,8 is a curriculum in equal parts.")
    ] = None,
    segment_length: Annotated[int | None, typer.Option(help="Tokens a segment.")] = None,
    slots: Annotated[int | None, typer.Option(help="Slots of the memory.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the memory's write; below 1 is sharper.")] = None,
    retention: Annotated[
        float | None, typer.Option(help="Norm of the forgetting bias at the start; smaller forgets slower.")
    ] = None,
    forgetting: Annotated[bool | None, typer.Option(help="Biased memory normalisation.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the learning rate.")] = None,
    method: Annotated[str | None, typer.Option(help="replay (least memory), checkpoint or bptt.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, or bfloat16 for autocast.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the data.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; by default a GPU if there is one.")] = "auto",
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: shard the model over the ranks, with no copy on each.")
    ] = False,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = 250,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
) -> None:
    """Trains a MemformerLM; Ctrl-C saves, --resume goes on.

    [bold]memformer-kernels train[/] learns the bytes of Python's standard library and tells, on files that were held
    out, the bits per byte with the memory and with it reset at each segment; [bold]--compare[/] adds a twin trained
    without memory, which is what the memory is to be judged against.
    [bold]memformer-kernels train --task recall[/] learns to remember a symbol across segments, in under a minute.
    [bold]torchrun --nproc-per-node 8 -m memformer_kernels.cli train[/] trains on 8 GPUs; the same run, to rounding.

    Writes metrics.jsonl, loss.png, checkpoint.safetensors, config.json and model.safetensors into --out.
    """
    from memformer_kernels.cli.train import Job
    from memformer_kernels.cli.train import train as run_train

    chosen = {
        "config": dict(
            segment_length=segment_length,
            slots=slots,
            width=width,
            heads=heads,
            layers=layers,
            dropout=dropout,
            temperature=temperature,
            retention=retention,
            forgetting=forgetting,
        ),
        "settings": dict(
            steps=steps,
            batch=batch,
            horizons=_numbers("--horizons", horizons),
            learning_rate=learning_rate,
            method=method,
            precision=precision,
            seed=seed,
        ),
    }
    chosen = {part: {k: v for k, v in values.items() if v is not None} for part, values in chosen.items()}
    out = out or Path("runs") / task
    if resume:
        _refuse_with_resume(context)
        job = Job.load(out)
    else:
        job = Job.make(task, [str(p) for p in paths or []], **chosen)
    run_train(
        job,
        out,
        device=_device(device),
        shard=shard,
        resume=resume,
        compare=compare,
        minutes=minutes,
        validate_every=validate_every,
        save_every=save_every,
    )


@app.command()
def generate(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A folder that `train` or `save_pretrained` wrote.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to go on from; - reads it from standard input.")] = "import ",
    length: Annotated[int, typer.Option(help="Bytes to make; memory use does not depend on it.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely byte.")] = 0.7,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely bytes only.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda; by default a GPU if there is one.")] = "auto",
) -> None:
    """Continues a prompt with a trained model, its memory carried from segment to segment."""
    from memformer_kernels.cli.generate import generate as run_generate

    content = sys.stdin.buffer.read() if prompt == "-" else prompt.encode()
    run_generate(run_folder, content, length, temperature, top_k, seed, _device(device))


@app.command()
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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the picture.")] = Path("runs/demo"),
    device: Annotated[str, typer.Option(help="cpu, cuda; by default a GPU if there is one.")] = "auto",
) -> None:
    """The whole story in a few minutes: recall, real text with its twin, peak memory; a table and a picture."""
    from memformer_kernels.cli.demo import demo as run_demo

    run_demo(out, _device(device))


def _device(name: str):
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"no such device: {name!r}; cpu, cuda or cuda:1, say") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"{name}: torch sees {torch.cuda.device_count()} GPUs here; --device cpu runs without")
    return device


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{option} takes numbers with commas between them, such as 2,4,8; got {text!r}"
        ) from None


def _refuse_with_resume(context: typer.Context) -> None:
    """A resumed run is the same run: what makes it up stands in its folder."""
    free = {"out", "task", "resume", "compare", "device", "shard", "minutes", "validate_every", "save_every"}
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in free and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--resume takes {name.replace('_', '-')} from the run in --out; leave it out")
