"""What the figures are held to, and a line for each op and pass that says whether they are met."""

from dataclasses import dataclass

from memformer_kernels.benchmarking.peers import OURS
from memformer_kernels.benchmarking.suite import BACKWARD, FORWARD, NO_BIAS, geometric_mean


@dataclass(frozen=True)
class Target:
    """Least ratio to the peers on any shape, least geometric mean of it, and least share of the floor.

    against: the peer that the ratios are to; the best one by default.
    share_above_ms: the share is asked for where the floor is above this.
    """

    ratio: float
    mean: float
    share: float
    against: str | None = None
    share_above_ms: float = 0.0


TARGETS = {
    ("memory_read", FORWARD): Target(1.0, 1.3, 0.75, share_above_ms=0.05),
    ("memory_read", BACKWARD): Target(1.3, 2.0, 0.55),
    ("memory_write", FORWARD): Target(1.5, 2.5, 0.6, against="flash + lse"),
    ("memory_write", BACKWARD): Target(1.5, 2.0, 0.5),
}
FORGETTING_COSTS = 1.05  # the write with forgetting over the write without it, at most
FORWARD_US, FORWARD_AND_BACKWARD_US = 15.0, 30.0  # host time of a call, at most


def summarise(report: dict) -> list[dict]:
    """One entry for each op, pass and group of shapes, and one for each further target.

    Each has `what`, `figures` (name to number), `targets` (name to number; none where nothing was asked for) and `met`
    (None where there is nothing to judge).
    """
    lines = []
    for op, which, group in dict.fromkeys((r["op"], r["pass"], r["group"]) for r in report["rows"]):
        rows = [r for r in report["rows"] if (r["op"], r["pass"], r["group"]) == (op, which, group)]
        lines.append(_pass_line(f"{op} {which}, {group} shapes", rows, TARGETS.get((op, which))))
    lines += _forgetting_line(report["rows"])
    for row in report["overhead"]:
        if row["implementation"] == OURS:
            asked = {"forward_us": FORWARD_US, "forward_and_backward_us": FORWARD_AND_BACKWARD_US}
            figures = {name: row[name] for name in asked if row[name] is not None}
            met = all(figures[name] <= asked[name] for name in asked) if len(figures) == len(asked) else None
            lines.append(_line(f"{row['op']} host time of a call", figures, asked, met))
    return lines


def _pass_line(what: str, rows: list[dict], target: Target | None) -> dict:
    timed = [r for r in rows if r["share_of_floor"] is not None]
    figures = {"shapes": len(rows), "shapes_timed": len(timed)}
    best = [r["ratio"] for r in timed if r["ratio"] is not None]
    _add_ratios(figures, "", best)
    _add_least(figures, "least_share_of_floor", [r["share_of_floor"] for r in timed])
    if target is None:
        return _line(what, figures, {}, None)
    if target.against:
        judged = [_ratio_to(r, target.against) for r in timed]
        judged = [ratio for ratio in judged if ratio is not None]
        _add_ratios(figures, f"_to_{target.against}", judged)
    else:
        judged = best
    above = f"_where_floor_above_{target.share_above_ms * 1e3:.0f}_us" if target.share_above_ms else ""
    shares = [r["share_of_floor"] for r in timed if r["floor_ms"] > target.share_above_ms]
    if above:
        _add_least(figures, f"least_share_of_floor{above}", shares)
    suffix = f"_to_{target.against}" if target.against else ""
    asked = {f"mean_ratio{suffix}": target.mean, f"least_ratio{suffix}": target.ratio}
    asked[f"least_share_of_floor{above}"] = target.share
    # a shape that has no time, or none of a peer, leaves the target open rather than met
    complete = len(timed) == len(rows) and len(judged) == len(rows)
    missed = any(name in figures and figures[name] < least for name, least in asked.items())
    return _line(what, figures, asked, False if missed else True if complete else None)


def _forgetting_line(rows: list[dict]) -> list[dict]:
    times = {}
    for r in rows:
        ms = r["results"].get(OURS, {}).get("ms")
        if r["op"] == "memory_write" and r["pass"] in (FORWARD, NO_BIAS) and ms is not None:
            times.setdefault(r["shape"], {})[r["pass"]] = ms
    costs = [t[FORWARD] / t[NO_BIAS] for t in times.values() if len(t) == 2]
    if not costs:
        return []
    figures = {"shapes": len(costs), "most_over_without": max(costs), "mean_over_without": geometric_mean(costs)}
    met = max(costs) <= FORGETTING_COSTS
    return [_line("memory_write forgetting fused", figures, {"most_over_without": FORGETTING_COSTS}, met)]


def _ratio_to(row: dict, peer: str) -> float | None:
    times = [row["results"].get(name, {}).get("ms") for name in (peer, OURS)]
    return None if None in times else times[0] / times[1]


def _add_ratios(figures: dict, suffix: str, ratios: list[float]) -> None:
    if ratios:
        figures[f"mean_ratio{suffix}"] = geometric_mean(ratios)
        figures[f"least_ratio{suffix}"] = min(ratios)


def _add_least(figures: dict, name: str, values: list[float]) -> None:
    if values:
        figures[name] = min(values)


def _line(what: str, figures: dict, targets: dict, met: bool | None) -> dict:
    return {"what": what, "figures": figures, "targets": targets, "met": met}
