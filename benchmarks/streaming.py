"""Time per token and device memory of reading ever longer texts, and tokens a second of decoding.

    python benchmarks/streaming.py --out results

The paper's sizes in bfloat16, 1 and 16 texts side by side. A series reads one text on and on, 4,096 tokens a call, and
is measured between lengths that grow by four: a model of linear time and constant memory takes the same time for every
token, and holds the same bytes. Each series stops at 4 M tokens, or before the length for which its share of
`--seconds` is too short. The GPU's own clock is read between calls, after a second of reading and without a pause: an
idle GPU has to reach its clock rate, and the first call of a text waits for nobody but the host.
Decoding is greedy, with the steps as CUDA graphs and with the same steps called one by one. Writes streaming.json and
streaming.png.

A CPU measures nothing: there a tiny model runs, to show that this does.
"""

import argparse
import dataclasses
import gc
import json
import time
from pathlib import Path

import torch

from memformer_kernels import PRESETS, Memformer, MemformerLM, MemformerLMConfig, generate, stream

CALL = 4096  # tokens of a text that are read at once
LENGTHS = [4**i for i in range(6, 12)]  # 4 K to 4 M
SERIES = [(preset, batch) for preset in ("paper-replay", "paper-wikitext") for batch in (1, 16)]
WARM_UP = 1.0 if torch.cuda.is_available() else 0.0  # seconds
DECODED = {True: 1024, False: 128}  # tokens, with graphs and without

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    CALL, LENGTHS, SERIES, DECODED = 64, [64, 256, 1024], [("small", 1), ("small", 2)], {True: 16, False: 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of streaming.json and streaming.png")
    parser.add_argument(
        "--seconds", type=float, default=200.0, help="of all series, default 200: enough for 4 M tokens"
    )
    parser.add_argument(
        "--only", default="", help="series whose name contains this, such as 'paper-replay, 16'; others in --out stay"
    )
    options = parser.parse_args()
    out = options.out
    series = [(preset, batch) for preset, batch in SERIES if options.only in f"{preset}, {batch} side by side"]
    if not series:
        names = "; ".join(f"{preset}, {batch} side by side" for preset, batch in SERIES)
        parser.error(f"--only must be part of one of these, got {options.only!r}: {names}")
    started = time.perf_counter()
    machine = (
        torch.cuda.get_device_name() if GPU else "a CPU, which measures nothing: a tiny model, to show that it runs"
    )
    print(f"on {machine}; torch {torch.__version__}")
    report = {"machine": machine, "torch": torch.__version__, "dtype": "bfloat16", "reading": [], "decoding": []}
    report["command"] = f"python benchmarks/streaming.py --seconds {options.seconds:g}"
    for i, (preset, batch) in enumerate(series):
        model, seconds = make(preset), (options.seconds - (time.perf_counter() - started)) / (len(series) - i)
        about = {"preset": preset, "config": dataclasses.asdict(model.config), "batch": batch}
        report["reading"].append({**about, **reading(model, batch, seconds)})
        report["decoding"].append({**about, **decoding(model, batch)})
        tell(report["reading"][-1], report["decoding"][-1])
    report["seconds"] = time.perf_counter() - started
    out.mkdir(parents=True, exist_ok=True)
    if options.only and (out / "streaming.json").exists():
        join(report, json.loads((out / "streaming.json").read_text()))
    (out / "streaming.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, out / "streaming.png")
    print(f"{report['seconds']:.0f} s; written: {out / 'streaming.json'}, {out / 'streaming.png'}")


def join(report: dict, before: dict) -> None:
    """Adds the series of an earlier run that this one left out."""
    if (report["machine"], report["torch"]) != (before["machine"], before["torch"]):
        raise SystemExit("streaming: the file in --out is of another machine or version; give another folder")
    for kind in ("reading", "decoding"):
        found = {(row["preset"], row["batch"]): row for row in before[kind] + report[kind]}
        report[kind] = [found[series] for series in SERIES if series in found]


def make(preset: str) -> Memformer | MemformerLM:
    torch.manual_seed(0)
    config = PRESETS[preset]
    model = (MemformerLM if isinstance(config, MemformerLMConfig) else Memformer)(config)
    return model.to(DEVICE, torch.bfloat16).eval()


def reading(model, batch: int, seconds: float) -> dict:
    """One text on and on, measured at every length."""
    texts, tokens = stream(model, batch), torch.randint(256, (batch, CALL), device=DEVICE)
    gc.collect()
    warm = now() + WARM_UP
    for _ in range(2):
        texts.read(tokens)
    while now() < warm:
        texts.read(tokens)
    texts.reset()
    if GPU:
        torch.cuda._sleep(2 * 10**7)  # cycles, in which the host gets ahead
    rows, marks, read, started = [], [mark()], 0, time.perf_counter()
    for length in LENGTHS:
        elapsed = time.perf_counter() - started
        if read and elapsed * length / read > seconds:
            break
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        for _ in range((length - read) // CALL):
            texts.read(tokens)
        rows.append({"tokens": length, **held()})
        marks.append(mark())
        read = length
    now()
    for row, last, since, until in zip(rows, [0, *LENGTHS], marks, marks[1:], strict=False):
        row["seconds_a_token"] = between(since, until) / (row["tokens"] - last)
    times = [row["seconds_a_token"] for row in rows]
    bytes_held = {tuple(row[name] for name in held()) for row in rows}
    return {"rows": rows, "slowest_over_fastest": max(times) / min(times), "same_bytes": len(bytes_held) == 1}


def decoding(model, batch: int) -> dict:
    rates = {}
    for graphs, length in DECODED.items():
        texts, prompt = model.start(batch, capture=graphs), torch.zeros(batch, 1, dtype=torch.long, device=DEVICE)
        generate(model, prompt, 2 * model.config.segment_length if graphs else 8, decoding=texts, temperature=0)
        texts.reset()
        since = now()
        generate(model, prompt, length, decoding=texts, temperature=0)
        rates["graphs" if graphs else "calls"] = length / (now() - since)
    return {"tokens_a_second_of_a_text": rates}


def now() -> float:
    """When all that was launched is done."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def mark() -> torch.cuda.Event | float:
    """A point in the GPU's time, without waiting for it."""
    if not GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(since: torch.cuda.Event | float, until: torch.cuda.Event | float) -> float:
    return since.elapsed_time(until) / 1e3 if GPU else until - since


def held() -> dict:
    """Bytes: of tensors now, of tensors at most since the last reset, and of the allocator."""
    if not GPU:
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
    }


def tell(read: dict, decoded: dict) -> None:
    print(f"\n{read['preset']}, {read['batch']} side by side: slowest over fastest {read['slowest_over_fastest']:.3f}")
    for row in read["rows"]:
        memory = "".join(f"  {name} {row[name]:,}" for name in held())
        print(f"{row['tokens']:>10,} tokens  {row['seconds_a_token'] * 1e6:9.3f} us a token{memory}")
    rates = decoded["tokens_a_second_of_a_text"]
    print(f"decoding: {rates['graphs']:,.0f} tokens/s with graphs, {rates['calls']:,.0f} without", flush=True)


def draw(report: dict, path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for series in report["reading"]:
        lengths = [row["tokens"] for row in series["rows"]]
        name = f"{series['preset']}, {series['batch']} side by side"
        left.plot(lengths, [row["seconds_a_token"] * 1e6 for row in series["rows"]], marker="o", label=name)
        if GPU:
            right.plot(lengths, [row["peak"] / 2**20 for row in series["rows"]], marker="o", label=name)
    for axes, what in ((left, "us a token of a text"), (right, "peak memory, MiB")):
        axes.set(xlabel="tokens read", ylabel=what, xscale="log", ylim=(0, None))
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(f"reading without end, bfloat16, on {report['machine']}", fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
