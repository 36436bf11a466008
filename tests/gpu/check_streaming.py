"""Streams, their pools and decoding on a GPU: the bits of unrecorded steps, constant memory, a model that changes.

    PYTHONPATH=. python tests/gpu/check_streaming.py --out /tmp/report

Prints a line a check, ends with 1 if one failed, and writes stream_checks.json. Without a GPU nothing is recorded: it
goes through the checks' own code, but for those of the GPU's memory.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from memformer_kernels import Memformer, MemformerConfig, MemformerLM, MemformerLMConfig, StreamPool, generate, stream
from memformer_kernels.state import StateFileError
from memformer_kernels.training import Settings, Trainer
from memformer_kernels.training.tasks import RecallTraining

SIZES = dict(vocabulary=256, width=128, heads=4, hidden=512, slots=16, segment_length=64)
ROWS, LENGTH = 4, 64
DECODED = {torch.float32: 2e-5, torch.bfloat16: 0.05}  # of the largest logit: kernels of other shapes round otherwise
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def language_model(dtype: torch.dtype) -> MemformerLM:
    torch.manual_seed(0)
    return MemformerLM(MemformerLMConfig(**SIZES, layers=3)).to(DEVICE, dtype).eval()


def encoder_decoder(dtype: torch.dtype) -> Memformer:
    torch.manual_seed(0)
    return Memformer(MemformerConfig(**SIZES, encoder_layers=2, decoder_layers=3)).to(DEVICE, dtype).eval()


def some_text(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (ROWS, length), generator=generator).to(DEVICE)


def same(*pairs: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in pairs)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the largest value."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def reading(model, text) -> list[dict]:
    plain, recorded = stream(model, ROWS, capture=False), stream(model, ROWS)
    want = plain.read(text)
    got = recorded.read(text)
    rows = [{"check": "recorded nats and memory have the bits of unrecorded ones"}]
    rows[-1]["ok"] = same((got, want), (recorded.memory, plain.memory)) and bool(got.isfinite().all())

    plain.reset()
    recorded.reset()
    logits = plain.read(text, logits=True)
    rows += [{"check": "so have logits, after a reset", "ok": same((recorded.read(text, logits=True), logits))}]

    ok = True
    for cuts in ([1, 2, 3], [LENGTH], [LENGTH - 1, LENGTH + 1, 2 * LENGTH + 7], [100, 100, 250]):
        recorded.reset()
        pieces = [recorded.read(piece) for piece in text.tensor_split(cuts, 1)]
        ok &= same((torch.cat(pieces, 1), want), (recorded.memory, plain.memory))
    rows += [{"check": "pieces do not matter, to the bit", "ok": ok}]

    recorded.reset()
    before = recorded.read(text[:, :100])
    recorded.reset([2])
    after = recorded.read(torch.cat([text[:2, 100:200], text[2:3, :100], text[3:, 100:200]]))
    others = [0, 1, 3]
    ok = same((after[2], want[2, :100]), (after[others], want[others, 100:200]), (before, want[:, :100]))
    rows += [{"check": "a reset row begins anew, the others go on, to the bit", "ok": ok}]

    recorded.reset()
    recorded.read(text[:, :100])
    state = recorded.state()
    first = recorded.read(text[:, 100:])
    recorded.load_state(state)
    ok = same((recorded.read(text[:, 100:]), first), (first, want[:, 100:]))
    rows += [{"check": "a state comes out and goes in, to the bit", "ok": ok}]

    one, two = stream(model, ROWS), stream(model, ROWS)
    other = text.flip(1)
    wanted = stream(model, ROWS, capture=False).read(other)
    taken = [(one.read(a), two.read(b)) for a, b in zip(text.split(50, 1), other.split(50, 1), strict=True)]
    ok = same(*((torch.cat(t, 1), w) for t, w in zip(zip(*taken, strict=True), (want, wanted), strict=True)))
    return [*rows, {"check": "two streams in turn do not see one another, to the bit", "ok": ok}]


def decoding(model, text, dtype) -> list[dict]:
    rows = []
    for prompt in (1, 100):
        for temperature, top_k in ((0, None), (0.8, None), (0.8, 20)):
            made = []
            for capture in (False, True):
                generator = torch.Generator(DEVICE).manual_seed(3)
                options = dict(temperature=temperature, top_k=top_k, generator=generator)
                begun = model.start(ROWS, capture=capture)
                made.append(generate(model, text[:, :prompt], 3 * LENGTH, decoding=begun, **options)[0])
            name = f"tokens after {prompt} are those without graphs, temperature {temperature}, top_k {top_k}"
            rows.append({"check": name, "ok": same(made)})
    plain, recorded = model.start(ROWS, capture=False), model.start(ROWS)
    pairs = [(recorded.extend(t), plain.extend(t)) for t in text.split(1, 1)]
    ok = same(*pairs, (recorded.memory, plain.memory))
    rows.append({"check": "decoded logits and memory have the bits of unrecorded ones", "ok": ok})
    decoded = torch.cat([logits for logits, _ in pairs], 1)
    far = difference(decoded, stream(model, ROWS).read(text, logits=True))
    rows.append({"check": "decoded logits are those that are read", "difference": far, "ok": far <= DECODED[dtype]})
    recorded.reset([1])
    plain.reset([1])
    ok = same(*((recorded.extend(t), plain.extend(t)) for t in text[:, : LENGTH + 9].split(1, 1)))
    return [*rows, {"check": "so after a row was reset", "ok": ok}]


def pool(model, text) -> list[dict]:
    """Ragged reads of a pool, in any order and beside NaN, against streams of as many rows."""
    width = 3
    want = [stream(model, width, capture=False).read(t.expand(width, -1))[0] for t in text]
    cuts = torch.randint(text.shape[1], (ROWS, 4), generator=torch.Generator().manual_seed(2)).sort(-1).values
    pieces = [t.tensor_split(c.tolist()) for t, c in zip(text, cuts, strict=True)]
    rows = []
    for capture in (False, True):
        kept = StreamPool(model, ROWS + 2, width=width, capture=capture)
        leases = [kept.open() for _ in text]
        state = kept.state(leases[0])
        nan = kept.open({n: t * float("nan") if t.is_floating_point() else t for n, t in state.items()})
        got = [[] for _ in text]
        address = kept._rows.memory.data_ptr()
        for i in range(5):
            order = [(row + i) % ROWS for row in range(ROWS)]
            read = kept.read([nan, *(leases[row] for row in order)], [text[0, :7], *(pieces[row][i] for row in order)])
            for row, nats in zip(order, read[1:], strict=True):
                got[row].append(nats)
            row = i % ROWS  # set aside and taken up in another slot
            state, count = kept.state(leases[row]), kept.tokens_read(leases[row])
            other = kept.open(state, tokens_read=count)
            kept.close(leases[row])
            leases[row] = other
        ok = same(*((torch.cat(g), w) for g, w in zip(got, want, strict=True)))
        ok &= bool(read[0].isnan().all()) and kept._rows.memory.data_ptr() == address
        how = "recorded" if capture else "unrecorded"
        rows.append({"check": f"texts of a pool have the bits of streams of its width, {how}", "ok": ok})
    return rows


def memory(model, text) -> list[dict]:
    """What the allocator holds after each of many turns, and its peak."""
    rows = []
    for kind in ("read", "decode"):
        texts = model.start(ROWS)

        def turn(texts=texts, kind=kind):
            if kind == "read":
                texts.read(text)
            else:
                for token in text[:, : LENGTH + 3].split(1, 1):
                    texts.decode(token)

        turn()
        turn()
        gc.collect()
        seen = set()
        for _ in range(20):
            torch.cuda.reset_peak_memory_stats()
            turn()
            torch.cuda.synchronize()
            figures = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
            seen.add(figures)
        found = dict(zip(("allocated", "peak", "reserved"), sorted(seen)[-1], strict=True))
        name = f"memory is the same to the byte after each of 20 turns of {kind}"
        rows.append({"check": name, "bytes": found, "ok": len(seen) == 1})
    return rows


def changes(make, dtype, text) -> list[dict]:
    """The model is trained, replaced, moved."""
    model = make(dtype)
    texts = model.start(ROWS)

    def equals_a_fresh_one() -> bool:
        texts.reset()
        fresh = model.start(ROWS, capture=False)
        read = same((texts.read(text), fresh.read(text)))
        return read and same((texts.extend(text[:, :1]), fresh.extend(text[:, :1])))

    first = texts.read(text)
    rows = [{"check": "a stream of the model as it was made", "ok": equals_a_fresh_one()}]
    recordings = dict(texts._recordings)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    ok = equals_a_fresh_one() and texts._recordings == recordings and not same((texts.read(text), first))
    rows.append({"check": "parameters changed in place are seen, by the same graphs", "ok": ok})
    model.head.weight = torch.nn.Parameter(model.head.weight * 2)
    ok = equals_a_fresh_one() and texts._recordings != recordings
    rows.append({"check": "replaced parameters are seen, by new graphs", "ok": ok})
    for enabled in (True, False):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            ok = equals_a_fresh_one()
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.95)
            ok &= equals_a_fresh_one()
        rows.append({"check": f"autocast {'on' if enabled else 'off again'}, and training under it", "ok": ok})
    model.to("cpu", torch.float64)
    said = ""
    try:
        texts.read(text)
    except ValueError as error:
        said = str(error)
    rows.append({"check": "a moved model is refused", "said": said, "ok": "model must stay" in said})
    moved = stream(model, ROWS)
    moved.load_state(texts.state())
    ok = bool(moved.read(text.cpu()).isfinite().all())
    return [*rows, {"check": "the state goes on with the moved model", "ok": ok}]


def state_files(model, text, folder: Path) -> list[dict]:
    texts, path = stream(model, ROWS), folder / "texts.safetensors"
    texts.read(text[:, :100])
    texts.save(path)
    want = texts.read(text[:, 100:])
    other = stream(model, ROWS)
    other.read(text[:, :9])
    other.load(path)
    ok = same((other.read(text[:, 100:]), want))
    rows = [{"check": "a saved text goes on in another stream, to the bit", "guarantee": "G17", "ok": ok}]
    content, refused = path.read_bytes(), 0
    places = range(0, len(content), max(1, len(content) // 100))
    before = other.state()
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            other.load(path)
        except StateFileError:
            refused += 1
    ok = refused == len(places) and same(*((t, before[name]) for name, t in other.state().items()))
    name = "a file with a bit flipped is refused, and nothing changes"
    return [*rows, {"check": name, "guarantee": "G17", "files": refused, "ok": ok}]


def resumed_training(folder: Path) -> list[dict]:
    """A run that goes on from its file, with graphs of its own, is the run that was not stopped."""
    rows = []
    for precision in ("float32", "bfloat16"):
        config = MemformerLMConfig(**{**SIZES, "vocabulary": 33, "segment_length": 8}, layers=2, dropout=0.1)
        settings = Settings(steps=12, batch=4, horizons=(3,), precision=precision)

        def trainer(config=config, settings=settings) -> Trainer:
            return Trainer(config, settings, RecallTraining(4, 8, 3, DEVICE, seed=0), DEVICE)

        whole, path = trainer(), folder / "checkpoint.safetensors"
        losses = [float(whole.step()) for _ in range(12)]
        first = trainer()  # seeds the random state, as a new process does
        for _ in range(5):
            first.step()
        first.save(path)
        torch.manual_seed(12345)
        second = trainer()
        second.load(path)
        ok = [float(second.step()) for _ in range(7)] == losses[5:]
        ok &= same(*zip(second.model.parameters(), whole.model.parameters(), strict=True))
        rows.append({"dtype": precision, "check": "resumed training is the same, to the bit", "guarantee": "G17"})
        rows[-1]["ok"] = ok
    return rows


def tell(rows: Iterable[dict]) -> list[dict]:
    rows = list(rows)
    for row in rows:
        told = {k: v for k, v in row.items() if k != "ok"}
        print("ok    " if row["ok"] else "FAILED", json.dumps(told), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of stream_checks.json")
    out = parser.parse_args().out
    if not GPU:
        print("no GPU: nothing is recorded, and the checks compare each step with itself")
    checks, started = [], time.perf_counter()
    for make in (language_model, encoder_decoder):
        for dtype in (torch.float32, torch.bfloat16):
            model, text = make(dtype), some_text(5 * LENGTH + 9)
            rows = reading(model, text) + decoding(model, text, dtype) + pool(model, text)
            rows += memory(model, text) if GPU else []
            with TemporaryDirectory() as folder:
                rows += state_files(model, text, Path(folder))
            rows += changes(make, dtype, text)
            checks += tell({"model": make.__name__, "dtype": str(dtype)[6:], **row} for row in rows)
    with TemporaryDirectory() as folder:
        checks += tell(resumed_training(Path(folder)))
    report = {"gpu": torch.cuda.get_device_name() if GPU else None, "torch": torch.__version__, "checks": checks}
    out.mkdir(parents=True, exist_ok=True)
    (out / "stream_checks.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{sum(row['ok'] for row in checks)} of {len(checks)} ok, {time.perf_counter() - started:.0f} s")
    raise SystemExit(not all(row["ok"] for row in checks))


if __name__ == "__main__":
    main()
