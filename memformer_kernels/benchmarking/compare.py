"""Two files of times, before and after a change, row by row."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from memformer_kernels.benchmarking import results
from memformer_kernels.benchmarking.suite import geometric_mean


@dataclass(frozen=True)
class Row:
    """Milliseconds of one row; `ratio` is after over before, so that above 1 is slower."""

    name: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before


@dataclass(frozen=True)
class Comparison:
    """rows: timed in both, the worst first. lost: timed before, and after tried without a time. only_before,
    only_after: not in the other file at all."""

    machines: tuple[str, str]
    rows: list[Row]
    lost: list[str]
    only_before: list[str]
    only_after: list[str]

    @property
    def mean(self) -> float:
        return geometric_mean([row.ratio for row in self.rows])

    def passes(self, most: float) -> bool:
        """No ratio above `most`, and no time lost."""
        return not self.lost and all(row.ratio <= most for row in self.rows)

    def as_json(self) -> dict:
        rows = [asdict(row) | {"ratio": row.ratio} for row in self.rows]
        return {**asdict(self), "rows": rows, "mean": self.mean, "worst": rows[0], "best": rows[-1]}


def compare(before: Path, after: Path) -> Comparison:
    """A ValueError where no row has a time in both files."""
    contents = results.read(before), results.read(after)
    old, new = (results.times(content, path) for content, path in zip(contents, (before, after), strict=True))
    timed = [name for name, ms in old.items() if not math.isnan(ms)]
    rows = [Row(name, old[name], new[name]) for name in timed if not math.isnan(new.get(name, math.nan))]
    if not rows:
        raise ValueError(f"compare: no row has a time in both {before} and {after}")
    rows.sort(key=lambda row: -row.ratio)
    return Comparison(
        (results.machine(contents[0]), results.machine(contents[1])),
        rows,
        lost=[name for name in timed if name in new and math.isnan(new[name])],
        only_before=[name for name in old if name not in new],
        only_after=[name for name in new if name not in old],
    )
