"""The pictures of training."""

from pathlib import Path

from memformer_kernels.figures import new_figure, save
from memformer_kernels.training.run import RunFolder

MEMORY, RESET, TWIN = "#1f77b4", "#ff7f0e", "#7f7f7f"


def draw_curves(folder: Path, unit: str) -> None:
    """`loss.png`: training loss, and the validations with memory, reset, and of the twin if there is one."""
    rows = RunFolder(folder).rows()
    twin_rows = RunFolder(folder / "twin").rows()
    figure, (left, right) = new_figure(2, (10, 4))
    for name, some, color in (("with memory", rows, MEMORY), ("twin", twin_rows, TWIN)):
        points = [(r["step"], r["loss"]) for r in some if "loss" in r]
        if points:
            steps, losses = zip(*points, strict=True)
            left.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
            left.plot(steps, _smooth(losses), color=color, label=name)
    left.set(xlabel="step", ylabel="training loss, nats a token")
    left.legend()
    for name, some, key, color in (
        ("with memory", rows, "memory", MEMORY),
        ("memory reset at each segment", rows, "reset", RESET),
        ("twin trained without memory", twin_rows, "reset", TWIN),
    ):
        points = [(r["step"], r[key]) for r in some if key in r]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=name)
    right.set(xlabel="step", ylabel=f"held out: {unit}")
    right.legend()
    save(figure, folder / "loss.png")


def draw_story(path: Path, bits: dict[str, float], peaks: dict[str, dict[int, float]], where: str) -> None:
    """The demo's picture: bits per byte of the three models, and peak memory of the three methods over the horizon."""
    figure, (left, right) = new_figure(2, (10, 4))
    names = {"memory": "with memory", "reset": "memory reset\nat each segment", "twin": "twin trained\nwithout memory"}
    bars = left.bar([names[k] for k in names], [bits[k] for k in names], color=[MEMORY, RESET, TWIN])
    left.bar_label(bars, fmt="%.3f")
    lowest = min(bits.values())
    left.set(ylabel="bits per byte, held-out files", ylim=(lowest - 0.3, max(bits.values()) + 0.1))
    left.set_title("lower is better; the axis does not start at 0", fontsize=9)
    for (method, points), style in zip(peaks.items(), ("o-", "s--", "^-"), strict=True):
        right.plot(list(points), [b / 2**20 for b in points.values()], style, label=method)
    right.set(xlabel="segments in the rollout", ylabel="peak memory, MiB", xscale="log", yscale="log")
    right.set_xticks(list(points), [str(p) for p in points])
    right.set_title(f"forward and backward of a rollout, {where}", fontsize=9)
    right.legend()
    save(figure, path)


def _smooth(values) -> list[float]:
    """Means of up to a tenth of the values, round each."""
    half = len(values) // 20
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
