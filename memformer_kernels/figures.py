"""Pictures without a screen: a figure, and how it is kept. matplotlib is imported when one is drawn."""

from pathlib import Path

OURS, OTHERS = "#1f77b4", ("#7f7f7f", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#17becf")


def new_figure(columns: int, size: tuple[float, float], rows: int = 1, **options):
    """A matplotlib figure of `size` inches, and its axes, row by row in one list."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no window

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
