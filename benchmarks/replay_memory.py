"""Peak memory of a rollout by full back-propagation, by checkpoints and by replay, as the horizon grows.

    python benchmarks/replay_memory.py
    python benchmarks/replay_memory.py --device cuda --preset paper-replay --horizons 1,4,16,64 --json memory.json

Each figure is the peak of one forward and backward pass of a MemformerLM, in a process of its own, over what was there
before: activations, memories and gradients, not the model. On a CPU it is exact, on a GPU as PyTorch's allocator has
it. The last column is the part of replay's that has to grow with the horizon: the memories it keeps, (S + 1) B M C 4
bytes. Full back-propagation grows by one segment's activations a segment.
"""

import argparse
import dataclasses
import json
import platform
from pathlib import Path

import torch

from memformer_kernels.benchmarking import plots
from memformer_kernels.models import PRESETS, MemformerLMConfig
from memformer_kernels.replay.api import METHODS
from memformer_kernels.training.peak_memory import measure_in_fresh_process, stored_bytes

LM_PRESETS = {name: config for name, config in PRESETS.items() if isinstance(config, MemformerLMConfig)}


def main() -> None:
    options = _parser().parse_args()
    config = LM_PRESETS[options.preset]
    machine = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    print(f"{options.preset}, batch {options.batch}, float32, on {machine}, torch {torch.__version__}; MiB\n")
    print(_line("segments", *options.methods, "memories"))
    rows = []
    for horizon in options.horizons:
        peaks = {
            method: measure_in_fresh_process(method, horizon, config, batch=options.batch, device=options.device)
            for method in options.methods
        }
        stored = stored_bytes(horizon, config, batch=options.batch)
        rows.append({"horizon": horizon, "peak_bytes": peaks, "stored_bytes": stored})
        print(_line(horizon, *(f"{b / 2**20:.1f}" for b in (*peaks.values(), stored))), flush=True)
    report = {"preset": options.preset, "config": dataclasses.asdict(config), "batch": options.batch}
    report |= {"device": options.device, "machine": machine, "torch": torch.__version__, "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot:
        plots.draw_replay_memory(report, options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--horizons", type=_numbers, default=[1, 4, 16, 64], help="segments of a rollout, default 1,4,16,64"
    )
    parser.add_argument(
        "--methods", type=_methods, default=list(METHODS), help=f"some of {','.join(METHODS)}, default all"
    )
    parser.add_argument("--preset", choices=LM_PRESETS, default="small", help="the model, default small")
    parser.add_argument("--batch", type=int, default=1, help="texts side by side, default 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw the table here (needs matplotlib)")
    return parser


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"horizons must be at least 1, got {min(numbers)}")
    return numbers


def _methods(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(METHODS):
        raise argparse.ArgumentTypeError(f"methods must be some of {', '.join(METHODS)}, got {', '.join(unknown)}")
    return text.split(",")


def _line(*columns: object) -> str:
    return "".join(f"{column:>12}" for column in columns)


if __name__ == "__main__":
    main()
