"""How the forgetting bias shortens memory: an unwritten slot against the formula, and recall over longer horizons.

    python benchmarks/forgetting.py --plot docs/images/forgetting.png --json benchmarks/results/forgetting.json

Left: a slot that attends only itself turns towards its bias; what is left of its direction across the bias is halved
every ln 2 / ln(1 + ||b||) segments, once the slot is near the bias. Right: models that learned to recall a symbol over
4 segments, asked over 2 to 64, for several norms of the bias at the start and without forgetting.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from memformer_kernels import memory_forget
from memformer_kernels.cli.train import Job

NORMS = (1.15, 0.3, 0.1, 0.02)
SEGMENTS = 60
HORIZONS = (2, 4, 8, 16, 32, 64)


def half_life(norm: float) -> float:
    return math.log(2) / math.log1p(norm)


def left_across(norm: float, segments: int = SEGMENTS, width: int = 64) -> list[float]:
    """Length of an unwritten slot's part across its bias, after 0, 1, ... segments; it starts at a right angle."""
    bias = torch.zeros(1, width, dtype=torch.float64)
    bias[0, 0] = norm
    slot = torch.zeros(1, 1, width, dtype=torch.float64)
    slot[..., 1] = 1
    lengths = []
    for _ in range(segments + 1):
        lengths.append(slot[..., 1:].norm().item())
        slot = memory_forget(slot, bias)
    return lengths


def measured_half_life(norm: float) -> float:
    """After 20 half-lives, where the slot is near its bias."""
    lengths = left_across(norm, segments=math.ceil(20 * half_life(norm)))
    return math.log(0.5) / math.log(lengths[-1] / lengths[-2])


def recall(seed: int, **config) -> dict[int, float]:
    """Accuracy by horizon of a model trained to recall over 4 segments."""
    job = Job.make("recall", [], config, {"seed": seed, "method": "bptt"})
    trainer = job.trainer(torch.device("cpu"))
    while not trainer.done:
        trainer.step()
    trainer.model.eval()
    return {h: trainer.task.validate(trainer.model, reset=False, everything=True, horizon=h) for h in HORIZONS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw both here (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    slots = {norm: left_across(norm) for norm in NORMS}
    print("norm of the bias   half-life by the formula   measured, segments")
    for norm in NORMS:
        print(f"{norm:16.2f}   {half_life(norm):24.2f}   {measured_half_life(norm):18.2f}")
    accuracy = {f"||b|| = {norm}": recall(options.seed, retention=norm) for norm in NORMS}
    accuracy["no forgetting"] = recall(options.seed, forgetting=False)
    print("\nrecall, trained over 4 segments, asked over " + ", ".join(map(str, HORIZONS)))
    for name, points in accuracy.items():
        print(f"{name:16} " + "  ".join(f"{a:.2f}" for a in points.values()))
    if options.json:
        half_lives = {n: {"formula": half_life(n), "measured": measured_half_life(n)} for n in NORMS}
        figures = {"half_life": half_lives, "recall": accuracy, "seed": options.seed, "torch": torch.__version__}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if options.plot:
        draw(slots, accuracy, options.plot)


def draw(slots: dict[float, list[float]], accuracy: dict[str, dict[int, float]], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for norm, lengths in slots.items():
        (line,) = left.plot(lengths, label=f"||b|| = {norm}: halved every {half_life(norm):.1f}")
        near = next(t for t, length in enumerate(lengths) if length < 0.3) if min(lengths) < 0.3 else None
        if near is not None:
            formula = [lengths[near] * 0.5 ** ((t - near) / half_life(norm)) for t in range(near, SEGMENTS + 1)]
            left.plot(range(near, SEGMENTS + 1), formula, ":", color="black", linewidth=1)
    left.plot([], [], ":", color="black", label="the formula, from 0.3 on")
    left.set(xlabel="segments without a write", ylabel="slot's part across its bias", yscale="log", ylim=(1e-3, 1.3))
    left.legend()
    for name, points in accuracy.items():
        right.plot(list(points), list(points.values()), "o-", label=name)
    right.axhline(1 / 16, color="grey", linestyle="--", label="chance")
    right.set(xlabel="segments of the rollout", ylabel="recall accuracy", xscale="log")
    right.set_xticks(HORIZONS, HORIZONS)
    right.minorticks_off()
    right.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
