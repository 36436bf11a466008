"""The commands that train a model and use it: what each takes, says and returns."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from memformer_kernels.cli.options import Device, JsonFile, find_device, parse_numbers


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
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser. Text: 1500, recall: 400.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after this long.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Lanes read side by side, by all ranks together. Text: 16, recall: 32.")
    ] = None,
    horizons: Annotated[
        str | None,
        typer.Option(help="Segments a rollout; 2,4,8: in equal parts of the run. Text: 12, recall: 2,4."),
    ] = None,
    segment_length: Annotated[int | None, typer.Option(help="Tokens a segment. Text: 32, recall: 8.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens a segment in equal parts of the run, up to --segment-length: 32,128.")
    ] = None,
    restart: Annotated[
        float | None, typer.Option(help="Chance that a lane begins anew at a rollout, so that the model learns to; 0.")
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Slots of the memory. Text: 32, recall: 8.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the model. Text: 128, recall: 64.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads; 4.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers. Text: 3, recall: 2.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout; 0.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the write's logits: below 1 is sharper; 0.25.")
    ] = None,
    retention: Annotated[
        float | None, typer.Option(help="Norm of the forgetting bias at the start: smaller forgets slower; 0.1.")
    ] = None,
    forgetting: Annotated[bool | None, typer.Option(help="Biased memory normalisation; on.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the learning rate. Text: 0.002, recall: 0.001.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="replay, which takes least memory; checkpoint; bptt.")] = None,
    precision: Annotated[str | None, typer.Option(help="bfloat16, for autocast, in the place of float32.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the weights and the data; 0.")] = None,
    device: Device = "auto",
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: shard the model over the ranks, with no copy on each.")
    ] = False,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = 250,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    json_file: JsonFile = None,
) -> None:
    """Trains a MemformerLM; Ctrl-C saves, --resume goes on.

    Without paths it learns the bytes of Python's standard library. It ends with the bits per byte of files that were
    held out, lower is better: with the memory, and with it reset at each segment. --compare adds a twin trained without
    memory, which is what the memory is to be judged against. --task recall learns to remember a symbol across segments,
    in under a minute, and tells the accuracy; chance is 0.06.

    Under torchrun it trains on all ranks: the same run, to rounding. Writes metrics.jsonl, loss.png,
    checkpoint.safetensors, config.json and model.safetensors into --out.

    [bold]Examples[/]

        memformer-kernels train --task recall
        memformer-kernels train my_texts/ --out runs/mine --compare
        memformer-kernels train --out runs/mine --resume
        torchrun --nproc-per-node 8 -m memformer_kernels.cli train my_texts/
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
            horizons=parse_numbers("--horizons", horizons),
            lengths=parse_numbers("--lengths", lengths),
            restart=restart,
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
        device=find_device(device),
        shard=shard,
        resume=resume,
        compare=compare,
        minutes=minutes,
        validate_every=validate_every,
        save_every=save_every,
        json_file=json_file,
    )


def generate(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A folder that `train` or `save_pretrained` wrote.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to go on from; - reads it from standard input.")] = "import ",
    length: Annotated[int, typer.Option(help="Bytes to make; memory use does not depend on it.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely byte.")] = 0.7,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely bytes only.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Device = "auto",
) -> None:
    """Continues a prompt with a trained model, its memory carried from segment to segment.

    Prints the prompt and the bytes that follow, as they are made: of any length, in constant memory. The same seed
    gives the same text.

    [bold]Examples[/]

        memformer-kernels generate runs/mine --prompt "def "
        cat start.txt | memformer-kernels generate runs/mine --prompt - --length 2000 --temperature 0
    """
    from memformer_kernels.cli.generate import generate as run_generate

    content = sys.stdin.buffer.read() if prompt == "-" else prompt.encode()
    run_generate(run_folder, content, length, temperature, top_k, seed, find_device(device))


def stream(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A folder that `train` or `save_pretrained` wrote.")
    ],
    file: Annotated[str, typer.Argument(metavar="FILE", help="The file to read; - is standard input.")] = "-",
    json_file: JsonFile = None,
    device: Device = "auto",
) -> None:
    """Reads bytes without end with a trained model, in constant memory, and tells their bits per byte.

    The memory is carried from the first byte to the last, and a byte costs the same wherever it stands. The first byte,
    of which nothing is known, counts 8 bits. Ctrl-C ends with the figures of what was read.

    [bold]Examples[/]

        memformer-kernels stream runs/mine book.txt
        zcat logs.gz | memformer-kernels stream runs/mine - --json figures.json
    """
    from memformer_kernels.cli.stream import stream as run_stream

    run_stream(run_folder, file, json_file, find_device(device))


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the picture.")] = Path("runs/demo"),
    device: Device = "auto",
) -> None:
    """The whole story in 6 minutes on 2 cores: recall, real text with its twin, peak memory; a table and a picture.

    The figures go into demo.json, the picture into demo.png. The twin is a model of the same size trained without
    memory: what is better than it is what the memory is worth.

    [bold]Examples[/]

        memformer-kernels demo --out runs/demo
    """
    from memformer_kernels.cli.demo import demo as run_demo

    run_demo(out, find_device(device))


def _refuse_with_resume(context: typer.Context) -> None:
    """A resumed run is the same run: what makes it up stands in its folder."""
    free = {
        "out",
        "task",
        "resume",
        "compare",
        "device",
        "shard",
        "minutes",
        "validate_every",
        "save_every",
        "json_file",
    }
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in free and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--resume takes {name.replace('_', '-')} from the run in --out; leave it out")
