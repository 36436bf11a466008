"""`demo`: the whole story in a few minutes, in three acts, with a table and a picture at the end."""

import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from memformer_kernels.cli import plots
from memformer_kernels.cli.train import Job, figures_table, train
from memformer_kernels.models import MemformerLMConfig
from memformer_kernels.replay.api import METHODS
from memformer_kernels.training.peak_memory import measure

console = Console()

# Small and quick: short segments show soonest what a memory is worth
TEXT = dict(
    config=dict(segment_length=16, slots=16, width=96, layers=2),
    settings=dict(steps=300, batch=16, horizons=(12,), learning_rate=4e-3, warmup=50),
)
MEASURED = MemformerLMConfig(segment_length=64, slots=16)
HORIZONS = (1, 4, 16, 64)


def demo(out: Path, device: torch.device) -> None:
    """Trains recall and text, measures memory, and prints what came of it."""
    started = time.perf_counter()
    console.rule("1. recall: a symbol is shown in the first of four segments and asked for in the last")
    recall = train(Job.make("recall", [], {}, {}), out / "recall", device=device, validate_every=100)
    console.rule("2. real text: the standard library of this Python, on files that were held out")
    text = train(Job.make("text", [], **TEXT), out / "text", device=device, compare=True, validate_every=100)
    console.rule("3. peak memory of forward and backward, by method and horizon")
    with console.status("measuring"):
        peaks = {m: {h: measure(m, h, MEASURED, device=device) for h in HORIZONS} for m in METHODS}

    console.rule("what came of it")
    accuracy = f"{recall['memory']:.2f} with memory, {recall['reset']:.2f} reset (chance 0.06)"
    console.print(f"recall over 4 segments: accuracy {accuracy}")
    console.print(figures_table(text, "bits per byte"))
    console.print(_memory_table(peaks))
    picture = out / "demo.png"
    plots.draw_story(picture, text, peaks, f"on {device}")
    (out / "demo.json").write_text(
        json.dumps({"recall": recall, "bits_per_byte": text, "peak_bytes": peaks}, indent=2) + "\n"
    )
    console.print(f"picture: {picture}   figures: {out / 'demo.json'}   {time.perf_counter() - started:.0f} s")


def _memory_table(peaks: dict[str, dict[int, float]]) -> Table:
    table = Table(title="peak memory, MiB", title_justify="left")
    table.add_column("segments in the rollout")
    for horizon in HORIZONS:
        table.add_column(str(horizon), justify="right")
    for method, points in peaks.items():
        table.add_row(method, *(f"{points[h] / 2**20:.1f}" for h in HORIZONS))
    return table
