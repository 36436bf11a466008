"""One picture an op: a column for each pass, a group of bars for each shape, as multiples of the shape's floor."""

from pathlib import Path

from memformer_kernels.benchmarking.peers import OURS

MOST_FLOORS = 8  # a longer bar is cut: the eager forms would squeeze all others
COLORS = ("#7f7f7f", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#17becf")


def draw(report: dict, folder: Path) -> list[Path]:
    """Writes `<op>.png` for each op that has a time, and returns their paths."""
    paths = []
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["op"] == op and _times(row)]
        if rows:
            paths.append(folder / f"{op}.png")
            _draw_op(op, rows, report.get("machine", {}).get("gpu", ""), report["dtype"], paths[-1])
    return paths


def _times(row: dict) -> dict[str, float]:
    return {name: f["ms"] for name, f in row["results"].items() if f["ms"] is not None}


def _draw_op(op: str, rows: list[dict], gpu: str, dtype: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    passes = list(dict.fromkeys(row["pass"] for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in _times(row)))
    names.sort(key=lambda name: name != OURS)
    colors = dict(zip((n for n in names if n != OURS), COLORS, strict=False)) | {OURS: "#1f77b4"}
    height = 0.8 / len(names)
    size = (1.8 + 4.2 * len(passes), 1.6 + 0.17 * len(shapes) * (len(names) + 1))
    figure, axes = plt.subplots(1, len(passes), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, which in zip(axes[0], passes, strict=True):
        for row in (r for r in rows if r["pass"] == which):
            place = shapes.index(row["shape"])
            for name, ms in _times(row).items():
                y, floors = place - 0.4 + (names.index(name) + 0.5) * height, ms / row["floor_ms"]
                axis.barh(y, min(floors, MOST_FLOORS), height, color=colors[name])
                cut = " \u25b6" if floors > MOST_FLOORS else ""
                axis.text(min(floors, MOST_FLOORS), y, f"{cut} {ms:.3f}", va="center", fontsize=6)
        axis.axvline(1, color="black", linewidth=1.2)
        axis.set(xlabel="times the floor; the numbers are ms", title=which, xlim=(0, MOST_FLOORS * 1.18))
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].set_ylim(-0.6, len(shapes) - 0.4)
    axes[0][0].set_yticks(range(len(shapes)), shapes, fontsize=8)
    axes[0][0].invert_yaxis()
    handles = [Patch(color=colors[name], label=name) for name in names] + [Line2D([], [], color="black", label="floor")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(f"{op}, {dtype}, {gpu}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
