"""How a training step scales over the GPUs of one machine: the same work on each rank, by one rank and by N.

    python benchmarks/scaling.py --out scaling.json
    python benchmarks/scaling.py --preset small --ranks 2 --parallel fsdp --out scaling.json

A step is what `memformer-kernels train` does: a rollout over the horizon, its backward, the reduction of the gradients,
clipping, the optimiser, the mean loss. Each rank has `batch` lanes, so with N ranks a step does N times the work of
one: efficiency is t1 / tN, 1 if the ranks cost each other nothing. A time is the median of the steps after the
warm-up, by CUDA events, of the slowest rank. Before, a tiny model is trained by one rank and by N on the same lanes:
their weights must agree to rounding. Without a GPU the ranks run on the CPU, over gloo, at the smallest preset, to show
that it works, and nothing is written.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from memformer_kernels.data import Text
from memformer_kernels.models import MemformerLMConfig
from memformer_kernels.testing import relative_error
from memformer_kernels.training import Settings, Trainer
from memformer_kernels.training.ranks import Ranks, joined
from memformer_kernels.training.tasks import TextTask

AGREEMENT = 1e-5  # of weights after four steps in float32, in units of the largest
WARM_UP = 5  # steps: compilation of the kernels, NCCL's connections, the allocator


@dataclass(frozen=True)
class Shape:
    model: MemformerLMConfig
    batch: int  # of each rank
    horizon: int
    precision: str = "bfloat16"


PRESETS = {
    "large": Shape(
        MemformerLMConfig(width=1024, heads=16, layers=8, hidden=4096, slots=128, segment_length=512), 32, 16
    ),
    "small": Shape(MemformerLMConfig(width=512, heads=8, layers=6, hidden=2048, slots=64, segment_length=256), 8, 8),
    "tiny": Shape(
        MemformerLMConfig(width=32, heads=2, layers=2, hidden=64, slots=4, segment_length=8), 2, 2, "float32"
    ),
}


def main() -> None:
    options = _parser().parse_args()
    on_gpu = torch.cuda.is_available()
    preset = options.preset or ("large" if on_gpu else "tiny")
    if not on_gpu and preset != "tiny":
        raise SystemExit(f"scaling: a CPU measures nothing here; it tries --preset tiny only, got {preset}")
    ranks = options.ranks or (torch.cuda.device_count() if on_gpu else 2)
    apart = disagreement(ranks, options.parallel == "fsdp")
    print(f"weights after 4 steps of 1 rank and of {ranks}: {apart:.1e} apart", flush=True)
    if not apart <= AGREEMENT:
        raise SystemExit(f"scaling: they must be within {AGREEMENT:.0e}; nothing is timed")
    seconds = {n: measure(n, preset, options.parallel == "fsdp", options.steps) for n in sorted({1, ranks})}
    if not on_gpu:
        print(f"{options.steps} steps on 1 rank and on {ranks} over gloo; a CPU measures nothing here: no times")
        return
    result = {
        "gpu": torch.cuda.get_device_name(),
        "ranks": ranks,
        "parallel": options.parallel,
        "preset": preset,
        "shape": dataclasses.asdict(PRESETS[preset]),
        "step_seconds": seconds,
        "disagreement": apart,
        "efficiency": seconds[1] / seconds[ranks],
        "tokens_per_second": {n: n * _tokens(PRESETS[preset]) / t for n, t in seconds.items()},
        "steps": options.steps,
        "warm_up": WARM_UP,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "command": shlex.join(["python", *sys.argv]),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for n, t in seconds.items():
        print(f"{n} ranks: {1e3 * t:.1f} ms a step, {result['tokens_per_second'][n]:,.0f} tokens/s")
    print(f"efficiency {result['efficiency']:.3f} -> {options.out}")


def measure(ranks: int, preset: str, shard: bool, steps: int) -> float:
    """Seconds of a step of the slowest rank."""
    return max(_on_ranks(ranks, _steps, PRESETS[preset], shard, steps).values())


def disagreement(ranks: int, shard: bool) -> float:
    alone, together = (torch.tensor(_on_ranks(n, _weights, shard)[0]) for n in (1, ranks))
    return relative_error(together, alone)


def _on_ranks(ranks: int, function: Callable, *arguments: object) -> dict:
    """What it returns on each rank, in processes of their own."""
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="scaling",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    return elastic_launch(launch, function)(*arguments)


def _weights(shard: bool) -> list[float]:
    """What each rank does: four steps of a tiny model; the first one returns the weights."""
    with joined(torch.device("cuda" if torch.cuda.is_available() else "cpu"), shard=shard) as ranks:
        trainer = _trainer(dataclasses.replace(PRESETS["tiny"], batch=8 // ranks.world), ranks, 4)
        while not trainer.done:
            trainer.step()
        weights = trainer.weights()
        return torch.cat([w.flatten() for w in weights.values()]).tolist() if ranks.first else []


def _steps(shape: Shape, shard: bool, steps: int) -> float:
    """What each rank does: the median of its steps, in seconds."""
    with joined(torch.device("cuda" if torch.cuda.is_available() else "cpu"), shard=shard) as ranks:
        trainer = _trainer(shape, ranks, WARM_UP + steps)
        return statistics.median([_timed(trainer) for _ in range(WARM_UP + steps)][WARM_UP:])


def _trainer(shape: Shape, ranks: Ranks, steps: int) -> Trainer:
    batch = shape.batch * ranks.world
    settings = Settings(steps=steps, batch=batch, horizons=(shape.horizon,), precision=shape.precision, warmup=1)
    text = torch.randint(256, (2**20,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    task = TextTask(Text(text, text, 1, 0), batch, shape.model.segment_length, ranks.device)
    return Trainer(shape.model, settings, task, ranks.device, ranks)


def _timed(trainer: Trainer) -> float:
    if trainer.device.type == "cpu":
        trainer.step()
        return 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    trainer.step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _tokens(shape: Shape) -> int:
    return shape.batch * shape.horizon * shape.model.segment_length


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="write the figures here")
    parser.add_argument("--preset", choices=PRESETS, help="default large, on a CPU tiny")
    parser.add_argument("--ranks", type=int, help="how many at the most, default one a GPU")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="default ddp")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed, default 20")
    return parser


if __name__ == "__main__":
    main()
