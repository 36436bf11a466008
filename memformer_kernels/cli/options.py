"""What several commands take."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Also write the figures here as JSON; - is standard output, all else goes to standard error.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; by default a GPU if there is one.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        help='Sizes in the place of the built-in ones, such as "B=8 H=8 M=128 L=4096 D=64"; as often as you like.',
    ),
]


def to_stdout(json_file: Path | None) -> bool:
    """Whether standard output is for the JSON alone."""
    return json_file == Path("-")


def write_json(content: dict, json_file: Path | None) -> None:
    text = json.dumps(content, indent=2) + "\n"
    if to_stdout(json_file):
        sys.stdout.write(text)
    elif json_file is not None:
        json_file.write_text(text)


def find_device(name: str):
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"no such device: {name!r}; cpu, cuda or cuda:1, say") from None
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device must be cpu or a GPU, such as cuda:1, got {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"{name}: torch sees {torch.cuda.device_count()} GPUs here; --device cpu runs without")
    return device


def parse_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{option} takes numbers with commas between them, such as 2,4,8; got {text!r}"
        ) from None
