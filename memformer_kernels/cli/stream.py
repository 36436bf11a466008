"""`stream`: the bits per byte of bytes without end."""

import math
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from memformer_kernels.cli import byte_models
from memformer_kernels.cli.options import to_stdout, write_json
from memformer_kernels.models import stream as open_stream

CHUNK = 2**16  # bytes read at once, or fewer where no more have come yet


def stream(folder: Path, file: str, json_file: Path | None, device: torch.device) -> dict:
    """Reads all of it, prints what came of it and returns the figures; when interrupted, of what was read."""
    model = byte_models.load(folder, device)
    count, bits, started = 0, 0.0, time.perf_counter()
    text = open_stream(model)
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TextColumn("{task.fields[news]}"), TimeRemainingColumn())
    with _open(file) as source:
        try:
            with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
                bar = progress.add_task("", total=_size(file), news="")
                while chunk := source.read1(CHUNK):
                    tokens = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)[None]
                    bits += text.read(tokens).double().sum().item() / math.log(2)
                    count += len(chunk)
                    progress.update(bar, completed=count, news=_say(_figures(count, bits, started)))
        finally:
            figures = {"model": str(folder), "file": file, "device": str(device), **_figures(count, bits, started)}
            where = sys.stderr if to_stdout(json_file) else sys.stdout
            print(f"{count:,} bytes read: {_say(figures)}", file=where, flush=True)
            write_json(figures, json_file)
    return figures


def _figures(count: int, bits: float, started: float) -> dict:
    seconds = time.perf_counter() - started
    rate = round(count / seconds, 1)
    return {
        "bytes": count,
        "bits_per_byte": bits / count if count else None,
        "bytes_per_second": rate,
        "seconds": seconds,
    }


def _say(figures: dict) -> str:
    if not figures["bytes"]:
        return "nothing to tell"
    return f"{figures['bits_per_byte']:.4f} bits per byte, {figures['bytes_per_second']:,.0f} bytes/s"


def _open(file: str):
    return open(sys.stdin.fileno(), "rb", closefd=False) if file == "-" else open(file, "rb")


def _size(file: str) -> int | None:
    """Of what has one: not of a pipe, nor of a device."""
    return (Path(file).stat().st_size or None) if file != "-" else None
