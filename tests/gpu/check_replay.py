"""Captured rollouts on a GPU: the bits of the uncaptured ones, the gradients of back-propagation, what stays behind.

    PYTHONPATH=. python tests/gpu/check_replay.py --out /tmp/report

Prints a line a check, ends with 1 if one failed, and writes replay.json.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch

from memformer_kernels import Memformer, MemformerConfig, MemformerLM, MemformerLMConfig
from memformer_kernels.replay import CapturedCell, memory_replay

SIZES = dict(vocabulary=64, width=64, heads=4, hidden=256, slots=8, segment_length=32)
ROWS, HORIZON = 4, 6
OF_BACK_PROPAGATION = 5e-6  # float32
CUDA = torch.device("cuda")


def language_model(dropout: float, recompute: str = "cheap") -> tuple:
    model = MemformerLM(MemformerLMConfig(**SIZES, layers=3, dropout=dropout, recompute=recompute)).to(CUDA)
    return model, [tuple(torch.randint(64, (ROWS, 32), device=CUDA) for _ in range(2)) for _ in range(HORIZON)]


def encoder_decoder(dropout: float) -> tuple:
    model = Memformer(MemformerConfig(**SIZES, encoder_layers=2, decoder_layers=3, dropout=dropout)).to(CUDA)
    return model, [tuple(torch.randint(64, (ROWS, 32), device=CUDA) for _ in range(3)) for _ in range(HORIZON)]


def gradients(
    model, cell, segments, *, reduction="none", autocast=False, batch=ROWS, **options
) -> dict[str, torch.Tensor]:
    """Of a rollout with a fixed seed; the loss goes along under a name of its own."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        outputs, memory = memory_replay(cell, segments, model.initial_memory(batch), reduction=reduction, **options)
    loss = (torch.stack(outputs).mean() if reduction == "none" else outputs) + memory.float().square().cos().mean()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def rollouts(make) -> list[dict]:
    """Captured against uncaptured, twice each: the first time captures."""
    rows = []
    for dropout in (0.0, 0.2):
        torch.manual_seed(0)
        model, segments = make(dropout)
        truth = gradients(model, model.loss, segments, method="bptt")
        for autocast in (False, True):
            captured = CapturedCell(model.cell, always=True)
            for reduction in ("none", "mean"):
                for budget in (None, 0, 10**9):
                    options = dict(reduction=reduction, autocast=autocast, activation_budget=budget)
                    expected = gradients(model, model.cell, segments, **options)
                    found = [gradients(model, captured, segments, **options) for _ in range(2)]
                    row = {"check": f"{make.__name__}, dropout {dropout}", **options}
                    row["same_bits"] = all(torch.equal(f[name], e) for f in found for name, e in expected.items())
                    row["ok"] = row["same_bits"]
                    if not autocast and dropout == 0:  # stages draw in another order than segments
                        row["of_back_propagation"] = max(
                            ((found[1][name] - t).abs().max() / t.abs().max().clamp(min=1e-30)).item()
                            for name, t in truth.items()
                        )
                        row["ok"] &= row["of_back_propagation"] <= OF_BACK_PROPAGATION
                    rows.append(row)
    return rows


def recomputed() -> list[dict]:
    """What is recomputed changes no bit, and all of it can be captured."""
    rows = []
    for dropout in (0.0, 0.2):
        found, said = [], []
        for recompute in ("none", "cheap", "all"):
            torch.manual_seed(0)
            model, segments = language_model(dropout, recompute)
            captured = CapturedCell(model.cell)
            cells = [model.cell, captured, captured]  # the first rollout records
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                found += [gradients(model, cell, segments, autocast=True, reduction="mean") for cell in cells]
            said += [(recompute, str(w.message)) for w in warned if "runs in Python" in str(w.message)]
        same = all(torch.equal(f[name], e) for f in found[1:] for name, e in found[0].items())
        row = {"check": f"recompute none, cheap, all, dropout {dropout}", "same_bits": same, "said": said}
        rows.append(row | {"ok": same and not said})
    return rows


def side_by_side() -> list[dict]:
    """Calls that run at a time, of sizes at which they do: no bit changes, over and over."""
    rows = []
    for batch, length, slots, dropout in ((8, 128, 128, 0.0), (8, 128, 128, 0.1), (4, 64, 32, 0.0)):
        torch.manual_seed(0)
        sizes = dict(vocabulary=256, width=512, heads=8, hidden=2048, layers=4, slots=slots, segment_length=length)
        model = MemformerLM(MemformerLMConfig(**sizes, dropout=dropout)).to(CUDA, torch.bfloat16)
        segments = [tuple(torch.randint(256, (batch, length), device=CUDA) for _ in range(2)) for _ in range(8)]
        captured, different = CapturedCell(model.cell, always=True), 0
        expected = gradients(model, model.cell, segments, reduction="mean", batch=batch)
        for _ in range(20):
            found = gradients(model, captured, segments, reduction="mean", batch=batch)
            different += not all(torch.equal(found[name], e) for name, e in expected.items())
        row = {"check": f"{batch} x {length} tokens, {slots} slots, dropout {dropout}", "of 20 differ": different}
        rows.append(row | {"ok": different == 0})
    return rows


def changes() -> list[dict]:
    """Between two rollouts of one form: the second is launched before it is known what has changed."""
    torch.manual_seed(0)
    model, segments = language_model(0.0)
    captured, options = CapturedCell(model.cell, always=True), dict(reduction="mean")

    def another_weight():
        model.head.weight = torch.nn.Parameter(model.head.weight.detach() * 2)

    def fewer_segments():
        del segments[-1]

    rows = []
    changing = dict(
        nothing=lambda: None,
        evaluation=model.eval,
        autocast=lambda: options.update(autocast=True),
        another_weight=another_weight,
        a_frozen_weight=lambda: model.embedding.weight.requires_grad_(False),
        a_budget=lambda: options.update(activation_budget=10**9),
        fewer_segments=fewer_segments,
    )
    for name, change in changing.items():
        gradients(model, captured, segments, **options)
        gradients(model, captured, segments, **options)
        change()
        expected, found = (gradients(model, cell, segments, **options) for cell in (model.cell, captured))
        same = all(found[n] is None if e is None else torch.equal(found[n], e) for n, e in expected.items())
        rows.append({"check": f"after a change of {name.replace('_', ' ')}", "same_bits": same, "ok": same})
    return rows


def fallback() -> list[dict]:
    """A cell that makes the host wait cannot be captured: it runs in Python, and PyTorch is as it was."""
    linear = torch.nn.Linear(16, 16).to(CUDA)

    def cell(x, state):
        state = torch.nn.functional.dropout(torch.tanh(linear(x) + state), 0.3)
        return state.sum() * (1 if state.sum().item() < 1e9 else 2), state

    def run(cell):
        torch.manual_seed(5)
        linear.zero_grad()
        segments = [torch.randn(4, 16, device=CUDA) for _ in range(3)]
        outputs, _ = memory_replay(cell, segments, torch.zeros(4, 16, device=CUDA))
        torch.stack(outputs).sum().backward()
        return linear.weight.grad.clone(), torch.rand(2, device=CUDA)

    expected, stream = run(cell), torch.cuda.current_stream()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = run(CapturedCell(cell))
    told = [str(w.message) for w in said if "runs in Python, not as CUDA graphs" in str(w.message)]
    ok = len(told) == 1 and all(map(torch.equal, found, expected)) and torch.cuda.current_stream() == stream
    again = run(CapturedCell(lambda x, s: (torch.tanh(linear(x) + s).sum(), torch.tanh(linear(x) + s)), always=True))
    return [
        {"check": "a cell that cannot be captured runs in Python", "said": told, "ok": ok},
        {"check": "the next capture succeeds", "ok": bool(again[0].isfinite().all())},
    ]


def graphs_are_let_go() -> list[dict]:
    """A rollout in Python holds a segment's graph, not the rollout's."""
    torch.manual_seed(0)
    model, _ = language_model(0.0)

    def peak(horizon: int) -> int:
        segments = [tuple(torch.randint(64, (64, 32), device=CUDA) for _ in range(2)) for _ in range(horizon)]
        loss, _ = memory_replay(model.cell, segments, model.initial_memory(64), reduction="mean")
        loss.backward()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        memory_replay(model.cell, segments, model.initial_memory(64), reduction="mean")[0].backward()
        return torch.cuda.max_memory_allocated() - before

    stored = 64 * 64 * 4 * (8 + 3 * 32)  # of a segment: its memory, its input, its features and their gradient
    one, few, many = peak(1), peak(32), peak(64)
    ok = many - few <= 32 * stored + one  # a group may be a segment larger
    return [{"check": "peak memory grows by what is stored", "bytes": [one, few, many], "stored": stored, "ok": ok}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of replay.json")
    out = parser.parse_args().out
    rows = [*rollouts(language_model), *rollouts(encoder_decoder), *recomputed(), *side_by_side()]
    rows += [*changes(), *fallback(), *graphs_are_let_go()]
    for row in rows:
        print("ok    " if row["ok"] else "FAILED", json.dumps({k: v for k, v in row.items() if k != "ok"}), flush=True)
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "replay.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} ok")
    raise SystemExit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
