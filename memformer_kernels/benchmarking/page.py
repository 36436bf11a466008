"""One Markdown page, with pictures, of a folder of result files: what `memformer-kernels report` writes."""

from collections.abc import Callable, Iterable
from pathlib import Path

from memformer_kernels.benchmarking import plots, results
from memformer_kernels.benchmarking.peers import OURS

PAGE = "report.md"
MIB = 2**20


def write(folder: Path, out: Path) -> tuple[list[Path], dict[str, str]]:
    """Writes `report.md` and its pictures into `out`; returns what was written, and why each other file is not shown.

    A ValueError where the folder holds no file of figures.
    """
    contents, skipped = {}, {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = results.read(path)
        except ValueError as error:
            skipped[path.name] = str(error)
            continue
        if results.kind(content) in SECTIONS:
            contents[path.stem] = content
        else:
            skipped[path.name] = "a form that this report does not know"
    if not contents:
        raise ValueError(f"report: {folder} holds no JSON file of figures")
    parts, pictures = ["# Measured\n"], []
    for kind, section in SECTIONS.items():
        of_kind = {name: content for name, content in contents.items() if results.kind(content) == kind}
        try:
            made = list(section(of_kind, out)) if of_kind else []
        except (KeyError, TypeError, AttributeError) as error:  # of another version, or damaged: the rest is shown
            skipped |= {f"{name}.json": f"looks like {kind}, but {error!r}" for name in of_kind}
            continue
        for text, some in made:
            parts.append(text)
            pictures += some
    out.mkdir(parents=True, exist_ok=True)
    page = out / PAGE
    page.write_text("\n".join(parts))
    return [page, *pictures], skipped


Part = tuple[str, list[Path]]  # Markdown, and the pictures in it


def _ops(files: dict[str, dict], out: Path) -> Iterable[Part]:
    for name, content in files.items():
        drawn = plots.draw(content, out / name)
        text = _head(f"Operations: {name}", content)
        text += "Device microseconds a call. The floor moves every byte once and multiplies at the rates measured; "
        text += "share is the floor over ours, ratio the best peer over ours.\n\n"
        header = ("op", "pass", "shape", "ours", "floor", "share", "best peer", "ratio")
        rows = [_op_row(row) for row in content["rows"]]
        yield text + _table(header, rows) + _images(drawn, out), drawn


def _op_row(row: dict) -> tuple:
    peer = row["best_peer"]
    best = f"{_number(row['results'][peer]['ms'] * 1e3, '.1f')}, {peer}" if peer else "-"
    ours = row["results"].get(OURS, {}).get("ms")
    micros = None if ours is None else ours * 1e3
    figures = _number(micros, ".1f"), _number(row["floor_ms"] * 1e3, ".1f"), _number(row["share_of_floor"], ".2f")
    return row["op"], row["pass"], row["shape"], *figures, best, _number(row["ratio"], ".2f")


def _counters(files: dict[str, dict], out: Path) -> Iterable[Part]:
    for name, content in files.items():
        text = _head(f"Hardware counters: {name}", content)
        text += "Per cent of the peak. Spilled: to and from local memory. Stalls: warps that wait at an issue.\n\n"
        percent = ("dram", "l2", "tensor", "xu", "fma", "alu", "issue", "occupancy")
        rows = []
        for row in content["counters"]:
            stalls = ", ".join(f"{reason.replace('_', ' ')} {count:.1f}" for reason, count in row["stalls"].items())
            figures = _number(row["us"], ".1f"), *(_number(row[column], ".0f") for column in percent)
            spilled = None if row["spilled"] is None else row["spilled"] / 1e6
            last = _number(row["registers"], ".0f"), _number(spilled, ".1f"), stalls or "-"
            rows.append((row["op"], row["shape"], row["pass"], row["kernel"], *figures, *last))
        header = ("op", "shape", "pass", "kernel", "us", *percent, "registers", "spilled MB", "stalls")
        yield text + _table(header, rows), []


def _read_forms(files: dict[str, dict], out: Path) -> Iterable[Part]:
    columns = ("width", "slots", "groups", "row_time", "slot_time")
    for name, content in files.items():
        text = _head(f"Forms of memory_read's forward: {name}", content)
        rows = [[format(form[column], ".3g") for column in columns] for form in content["forms"]]
        header = ("channels", "slots of a tile", "groups of warps", "ps a row", "ps a slot of a row")
        yield text + _table(header, rows), []


def _rollouts(files: dict[str, dict], out: Path) -> Iterable[Part]:
    for name, content in files.items():
        picture = plots.draw_rollouts(content, out / name / "rollouts.png")
        rows = [
            (shape, r["run"], _number(r.get("ms"), ".1f"), _number(r.get("busy_ms"), ".1f"), r.get("peak_MiB", "-"))
            for shape, part in content["shapes"].items()
            for r in part["rows"]
        ]
        table = _table(("shape", "run", "ms", "of it a kernel ran", "peak MiB"), rows)
        yield _head(f"Rollouts: {name}", content) + table + _images([picture], out), [picture]


def _accelerated(files: dict[str, dict], out: Path) -> Iterable[Part]:
    for name, content in files.items():
        parts = content["shapes"].items()
        rows = [
            (shape, row["dtype"], row["run"], _number(row.get("ms"), ".1f"), _number(row.get("peak_MiB"), ".0f"))
            for shape, part in parts
            for row in part["rows"]
        ]
        text = _head(f"The PyPI package memformer, accelerated: {name}", content)
        yield text + _table(("shape", "dtype", "run", "ms", "peak MiB"), rows), []


def _cross_attention(files: dict[str, dict], out: Path) -> Iterable[Part]:
    for name, content in files.items():
        rows = [
            (
                where,
                row["keys"],
                row["pass"],
                *(_number(row[way].get("ms"), ".3f") for way in ("sdpa", "cross_attention")),
            )
            for where in ("attention", "bart")
            for row in content[where]
        ]
        text = _head(f"In the place of scaled_dot_product_attention: {name}", content)
        yield text + _table(("", "keys", "pass", "SDPA, ms", "cross_attention, ms"), rows), []


def _contract(files: dict[str, dict], out: Path) -> Iterable[Part]:
    names = list(dict.fromkeys(name for content in files.values() for name in content["guarantees"]))
    rows = []
    for name in sorted(names, key=lambda name: int(name[1:])):
        found = [content["guarantees"].get(name, {"passed": 0, "failed": 0}) for content in files.values()]
        rows.append((name, *(f"{f['passed']} passed, {f['failed']} failed" for f in found)))
    yield "## The numerics contract\n\n" + _table(("", *files), rows), []


def _mutants(files: dict[str, dict], out: Path) -> Iterable[Part]:
    rows = [(n, c["planted"], c["killed"], ", ".join(c["survivors"]) or "-") for n, c in files.items()]
    yield "## Planted faults\n\n" + _table(("file", "planted", "found by the tests", "not found"), rows), []


def _streaming(files: dict[str, dict], out: Path) -> Iterable[Part]:
    for name, content in files.items():
        rows = []
        for read, made in zip(content["reading"], content["decoding"], strict=True):
            longest = read["rows"][-1]
            times = f"{longest['seconds_a_token'] * 1e6:.2f}", f"{read['slowest_over_fastest']:.3f}"
            tokens = f"{made['tokens_a_second_of_a_text']['graphs']:,.0f}"
            same = "yes" if read["same_bytes"] else "no"
            rows.append((read["preset"], read["batch"], f"{longest['tokens']:,}", *times, same, tokens))
        header = ("model", "texts", "tokens", "us a token", "slowest over fastest", "same bytes", "decoded tokens/s")
        yield _head(f"Texts without end: {name}", content) + _table(header, rows), []


def _scaling(files: dict[str, dict], out: Path) -> Iterable[Part]:
    rows = []
    for name, content in files.items():
        times = (f"{ranks}: {seconds * 1e3:.1f}" for ranks, seconds in content["step_seconds"].items())
        figures = content["preset"], content["parallel"], ", ".join(times), f"{content['efficiency']:.3f}"
        rows.append((name, results.machine(content), *figures))
    header = ("file", "machine", "model", "by", "ms a step, by ranks", "efficiency")
    yield "## Many GPUs\n\n" + _table(header, rows), []


def _replay_memory(files: dict[str, dict], out: Path) -> Iterable[Part]:
    for name, content in files.items():
        picture = plots.draw_replay_memory(content, out / name / "memory.png")
        methods = list(content["rows"][0]["peak_bytes"])
        rows = [(r["horizon"], *(f"{r['peak_bytes'][m] / MIB:.1f}" for m in methods)) for r in content["rows"]]
        text = _head(f"Peak memory of a rollout: {name}", content) + "MiB over the model's own.\n\n"
        yield text + _table(("segments", *methods), rows) + _images([picture], out), [picture]


def _memory_gain(files: dict[str, dict], out: Path) -> Iterable[Part]:
    rows = []
    for name, content in sorted(files.items(), key=lambda item: item[1]["model"]["segment_length"]):
        figures = content["bits_per_byte"]
        columns = [_mean(figures[key]) if key in figures else "-" for key in ("memory", "reset", "twin", "gain")]
        rows.append((name, content["device"], content["model"]["segment_length"], *columns))
    header = ("file", "where", "bytes a segment", "with memory", "memory reset", "twin", "gain over the twin")
    yield "## What the memory is worth\n\nBits per byte, held out.\n\n" + _table(header, rows), []


def _forgetting(files: dict[str, dict], out: Path) -> Iterable[Part]:
    for name, content in files.items():
        lives = content["half_life"].items()
        rows = [(norm, f"{life['formula']:.2f}", f"{life['measured']:.2f}") for norm, life in lives]
        text = _head(f"Forgetting: {name}", content) + "Half-life of an unwritten slot, in segments.\n\n"
        text += _table(("norm of the bias", "by the formula", "measured"), rows)
        horizons = list(next(iter(content["recall"].values())))
        rows = [(who, *(f"{points[h]:.2f}" for h in horizons)) for who, points in content["recall"].items()]
        text += "\nAccuracy of recall over longer rollouts, in segments.\n\n"
        yield text + _table(("model", *horizons), rows), []


def _demo(files: dict[str, dict], out: Path) -> Iterable[Part]:
    for name, content in files.items():
        rows = [("recall, accuracy", *(_number(content["recall"].get(key), ".3f") for key in ("memory", "reset")), "-")]
        bits = content["bits_per_byte"]
        rows.append(("text, bits per byte", *(_number(bits.get(key), ".3f") for key in ("memory", "reset", "twin"))))
        text = _head(f"Demo: {name}", content)
        yield text + _table(("", "with memory", "memory reset", "twin"), rows), []


def _checks(files: dict[str, dict], out: Path) -> Iterable[Part]:
    rows, failures = [], []
    for name, content in files.items():
        found = content["checks"]
        verdicts = {k: c.get("passed") for k, c in found.items()} if isinstance(found, dict) else {}
        if isinstance(found, list):
            verdicts = {f"{i}: {c.get('check', '')}": c.get("ok") for i, c in enumerate(found)}
        rows.append((name, results.machine(content), sum(map(bool, verdicts.values())), len(verdicts)))
        failures += [f"- {name}: {check}" for check, passed in verdicts.items() if not passed]
    text = "## Checks on a GPU\n\n" + _table(("file", "machine", "passed", "of"), rows)
    yield text + ("\nNot passed:\n\n" + "\n".join(failures) + "\n" if failures else ""), []


def _errors(files: dict[str, dict], out: Path) -> Iterable[Part]:
    for name, content in files.items():
        rows = [
            (r["op"], r["sizes"], r["backend"], r["dtype"], f"{max(r['errors'].values()):.1e}", f"{r['limit']:.1e}")
            for r in content["rows"]
        ]
        header = ("op", "sizes", "backend", "dtype", "largest error", "limit")
        yield _head(f"Errors against float64: {name}", content) + _table(header, rows), []


SECTIONS: dict[str, Callable[[dict[str, dict], Path], Iterable[Part]]] = {
    "ops": _ops,
    "counters": _counters,
    "read forms": _read_forms,
    "rollouts": _rollouts,
    "accelerated": _accelerated,
    "cross attention": _cross_attention,
    "scaling": _scaling,
    "streaming": _streaming,
    "replay memory": _replay_memory,
    "memory gain": _memory_gain,
    "forgetting": _forgetting,
    "demo": _demo,
    "errors": _errors,
    "contract": _contract,
    "mutants": _mutants,
    "checks": _checks,
}


def _head(title: str, content: dict) -> str:
    machine, command = results.machine(content), content.get("command")
    lines = [f"## {title}", ""]
    lines += [f"{machine}."] if machine else []
    lines += [f"By `{command}`."] if command else []
    return "\n".join(lines) + "\n\n"


def _table(header: tuple, rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _images(paths: list[Path], out: Path) -> str:
    return "".join(f"\n![{path.stem}]({path.relative_to(out).as_posix()})\n" for path in paths)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean(figures: dict) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{figures['mean']:.3f} \u00b1 {figures['stdev']:.3f}"
