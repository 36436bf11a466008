"""No state file loads but the one that was written: flipped bits, and what a hostile or unlucky hand can do."""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys

import golden_states as golden
import pytest
import torch

from memformer_kernels import Memformer, MemformerLM, MemformerLMConfig, stream
from memformer_kernels.state import StateFileError, files

pytestmark = pytest.mark.guarantee("G17")

V, L = 7, 4
KINDS = [MemformerLM, Memformer]


@pytest.fixture(scope="module")
def texts():
    torch.manual_seed(0)
    config = MemformerLMConfig(vocabulary=V, width=4, heads=2, hidden=4, layers=1, slots=2, segment_length=L)
    made = stream(MemformerLM(config).eval(), 2)
    made.read(torch.randint(V, (2, 2 * L + 1)))
    made.reset([0])
    made.read(torch.randint(V, (2, 2)))  # so that no row is as the other
    return made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


@pytest.fixture
def good(texts, path):
    texts.save(path, stream_id="one", step=9)
    assert texts.load(path)["step"] == 9
    return path.read_bytes()


# Bits


def test_no_flipped_bit_of_a_stream_is_loaded(texts, path, good):
    unnoticed = []
    for bit in random.Random(0).sample(range(8 * len(good)), 5000):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            texts.load(path)
            unnoticed.append((bit, good[max(0, bit // 8 - 10) : bit // 8 + 10]))
        except StateFileError:
            pass
    assert not unnoticed


# Attacks: `name, content`, each of a file that was good.


class Parts:
    """A file taken apart, to be put together otherwise."""

    def __init__(self, raw):
        length = struct.unpack("<Q", raw[:8])[0]
        self.outer, self.data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        self.inner = json.loads(self.outer.pop("__metadata__")["memformer_kernels"])

    def write(self, name, values):
        """Other values of a tensor, with their digest."""
        begin, end = self.outer[name]["data_offsets"]
        data = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert len(data) == end - begin
        self.data = self.data[:begin] + data + self.data[end:]
        self.inner["digests"][name] = files.digest(name, values)
        return self

    def inner_text(self, sign=True):
        if sign:
            self.inner.pop("digest", None)
            text = json.dumps(self.inner, sort_keys=True)
            self.inner["digest"] = files.hashlib.sha256(text.encode()).hexdigest()
        return json.dumps(self.inner)

    def outer_text(self, sign=True):
        return json.dumps({"__metadata__": {"memformer_kernels": self.inner_text(sign)}, **self.outer})

    def pack(self, sign=True):
        return packed(self.outer_text(sign).encode(), self.data)


def packed(header, data):
    return struct.pack("<Q", len(header)) + header + data


def changed(raw, change, sign=True):
    """The file with its parts changed; where `sign`, by somebody who also makes the metadata's digest anew."""
    parts = Parts(raw)
    change(parts)
    return parts.pack(sign)


def cut_and_longer(raw):
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for length in {*range(0, 12), header - 1, header, header + 1, *range(16, len(raw), len(raw) // 24), len(raw) - 1}:
        yield f"first {length} bytes", raw[:length]
    for extra in (b"\0", b" " * 8, b"{}", raw):
        yield f"{len(extra)} bytes more", raw + extra
    yield "without its first byte", raw[1:]
    yield "twice the header", raw[:header] + raw[:header] + raw[header:]


def header_lengths(raw):
    length = struct.unpack("<Q", raw[:8])[0]
    for wrong in (0, 1, length - 1, length + 1, length - 8, len(raw) - 8, len(raw), 2**31, 2**32, 2**63, 2**64 - 1):
        yield f"header of {wrong}", struct.pack("<Q", wrong) + raw[8:]
    yield "length in the other order", raw[:8][::-1] + raw[8:]


def swapped(raw):
    names = ["filled", "logits", "memory", "tokens"]
    for a, b in [(a, b) for a in names for b in names if a < b]:

        def swap(parts, a=a, b=b):
            parts.outer[a], parts.outer[b] = parts.outer[b], parts.outer[a]

        yield f"{a} is {b}", changed(raw, swap, sign=False)
    for name in names:
        begin, end = Parts(raw).outer[name]["data_offsets"]

        def turn(parts, begin=begin, end=end):
            half = (begin + end) // 2
            parts.data = parts.data[:begin] + parts.data[half:end] + parts.data[begin:half] + parts.data[end:]

        yield f"rows of {name} change places", changed(raw, turn, sign=False)


def wrong_schema(raw):
    for name, field in Parts(raw).outer.items():
        size = field["data_offsets"][1] - field["data_offsets"][0]
        for dtype, width in (("F32", 4), ("I32", 4), ("F64", 8), ("I64", 8), ("F16", 2), ("U8", 1), ("BOOL", 1)):
            if dtype != field["dtype"]:
                new = {**field, "dtype": dtype, "shape": [size // width]}
                yield f"{name} as {dtype}", changed(raw, lambda p, n=name, f=new: p.outer.update({n: f}))
        yield f"{name} as C64", changed(raw, lambda p, n=name: p.outer[n].update(dtype="C64"))
        shape = field["shape"]
        for wrong in (shape[::-1] + [1], [1, *shape], [2**62, 4], [2**64, 1], [-shape[0], -1], [], [0], "2", None):
            if wrong != shape:
                yield f"{name} {wrong}", changed(raw, lambda p, n=name, w=wrong: p.outer[n].update(shape=w))
        for wrong in ([0, 2**40], [8, 0], [-8, size], [0], [0.0, 8.0], None, [1, size + 1]):
            yield f"{name} at {wrong}", changed(raw, lambda p, n=name, w=wrong: p.outer[n].update(data_offsets=w))
        for wrong in ("", f"{name} ", name.upper(), "../state", "/etc/passwd", f"{name}\0", "__proto__"):

            def rename(parts, name=name, wrong=wrong):
                parts.outer[wrong] = parts.outer.pop(name)
                parts.inner["digests"][wrong] = parts.inner["digests"].pop(name)

            yield f"{name} renamed {wrong!r}", changed(raw, rename)

        def drop(parts, name=name):
            begin, end = parts.outer.pop(name)["data_offsets"]
            del parts.inner["digests"][name]
            parts.data = parts.data[:begin] + parts.data[end:]
            for field in parts.outer.values():
                field["data_offsets"] = [at - (end - begin) * (at >= end) for at in field["data_offsets"]]

        yield f"without {name}", changed(raw, drop)

    def hole(parts):
        parts.data += b"\0" * 8

    def one_more(parts):
        at = len(parts.data)
        parts.data += b"\0" * 8
        parts.outer["more"] = {"dtype": "I64", "shape": [1], "data_offsets": [at, at + 8]}
        parts.inner["digests"]["more"] = files.digest("more", torch.zeros(1, dtype=torch.long))

    yield "a hole", changed(raw, hole)
    yield "one more tensor", changed(raw, one_more)


def wrong_metadata(raw):
    inner = Parts(raw).inner
    for field in inner:
        yield f"without {field}", changed(raw, lambda p, f=field: p.inner.pop(f), sign=False)
        yield f"{field} is other", changed(raw, lambda p, f=field: p.inner.update({f: "other"}), sign=False)
    for field, values in {
        "format": ["pt", None],
        "version": [0, 2, 10**9, "1", 1.0, True, None],
        "kind": ["MemformerLM", "checkpoint", None],
        "model": ["Memformer", None],
        "weights": ["0" * 64, None],
        "config": [None, [], {}],
        "digests": [None, [], {}, 1, "sha"],
        "step": [-1, "9", 1.5, True, []],
        "stream_id": [5, ["one"], {}],
    }.items():
        for value in values:
            yield f"{field} {value!r}, signed", changed(raw, lambda p, f=field, v=value: p.inner.update({f: v}))
    for field, value in inner["config"].items():
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else "other"
        yield f"config {field}", changed(raw, lambda p, f=field, v=other: p.inner["config"].update({f: v}))
    yield "config more", changed(raw, lambda p: p.inner["config"].update(depth=3))
    for name in inner["digests"]:
        for value in ("0" * 64, None, 5):
            yield f"digest {name} {value}", changed(raw, lambda p, n=name, v=value: p.inner["digests"].update({n: v}))
        yield f"no digest {name}", changed(raw, lambda p, n=name: p.inner["digests"].pop(n))
    yield "a digest of nothing", changed(raw, lambda p: p.inner["digests"].update(nothing="0" * 64))
    for number in ("NaN", "Infinity", "-Infinity", "1" * 5000):
        parts = Parts(raw)
        text = parts.inner_text().replace('"step": 9', f'"step": {number}')
        header = json.dumps({"__metadata__": {"memformer_kernels": text}, **parts.outer})
        yield f"step {number[:9]}", packed(header.encode(), parts.data)


def wrong_json(raw):
    parts = Parts(raw)
    text, inner = parts.outer_text(), parts.inner_text()
    for name in (*parts.outer, "__metadata__"):
        value = json.dumps(json.loads(text)[name])
        yield f"{name} twice", packed(f'{{"{name}": {value}, {text[1:]}'.encode(), parts.data)
    for name, value in parts.inner.items():
        twice = f'{{"{name}": {json.dumps(value)}, {inner[1:]}'
        header = json.dumps({"__metadata__": {"memformer_kernels": twice}, **parts.outer})
        yield f"metadata {name} twice", packed(header.encode(), parts.data)
    for name, header in {
        "UTF-16": text.encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "not UTF-8": text.encode().replace(b"one", b"\xff\xfe\xfd"),
        "deep": b"[" * 100_000,
        "a list": f"[{text}]".encode(),
        "a number": b"1",
        "empty": b"{}",
        "no metadata": json.dumps(parts.outer).encode(),
        "metadata of others": json.dumps({"__metadata__": {"format": "pt"}, **parts.outer}).encode(),
        "metadata as an object": json.dumps(
            {"__metadata__": {"memformer_kernels": parts.inner}, **parts.outer}
        ).encode(),
        "metadata as a list": json.dumps({"__metadata__": {"memformer_kernels": "[]"}, **parts.outer}).encode(),
        "a comment": b"/**/" + text.encode(),
        "more behind": text.encode() + b"{}",
    }.items():
        yield name, packed(header, parts.data)


def wrong_values(raw):
    """With every digest made anew: what only meaning shows."""
    memory, logits = torch.zeros(2, 2, 4), torch.zeros(2, V)
    for value in (float("nan"), float("inf"), -float("inf")):
        for name, like in (("memory", memory), ("logits", logits)):
            bad = like.clone()
            bad.view(-1)[-1] = value
            yield f"{value} in {name}", Parts(raw).write(name, bad).pack()
    for token in (-1, V, 2**40, -(2**63)):
        bad = torch.zeros(2, L, dtype=torch.long)
        bad[1, 2] = token
        yield f"token {token}", Parts(raw).write("tokens", bad).pack()
    for filled in (-1, L, 2**40):
        yield f"filled {filled}", Parts(raw).write("filled", torch.tensor([0, filled])).pack()


def foreign(raw):
    buffer = io.BytesIO()
    torch.save({"memory": torch.zeros(2, 2, 4)}, buffer)
    yield "torch.save", buffer.getvalue()
    yield "pickle", pickle.dumps({"memory": [0.0]})
    yield from {"zeros": bytes(4096), "ones": b"\xff" * 4096, "zip": b"PK\3\4" * 99, "json": b"{}" * 99}.items()


ATTACKS = [cut_and_longer, header_lengths, swapped, wrong_schema, wrong_metadata, wrong_json, wrong_values, foreign]
# What a configuration says of how it runs is nothing that a state depends on, nor are these digests of anything else.
HARMLESS = {"config dropout", "config recompute", "config backend"}


def test_no_attack_is_loaded(texts, path, good, same_bits):
    before, attacks = texts.state(), [attack for family in ATTACKS for attack in family(good)]
    assert len(attacks) >= 200
    loaded = []
    for name, content in attacks:
        assert content != good, name
        path.write_bytes(content)
        try:
            texts.load(path)
            loaded.append(name)
        except StateFileError as error:
            assert str(error).startswith(f"{path}: "), name
        assert same_bits(texts.state(), before), name
    assert set(loaded) <= HARMLESS


def test_parts_put_together_again_are_loaded(texts, path, good):
    """The attacks fail for what they change, not for how they are made."""
    path.write_bytes(Parts(good).pack())
    assert texts.load(path)["step"] == 9
    path.write_bytes(Parts(good).write("memory", torch.full((2, 2, 4), 0.5)).pack())
    texts.load(path)
    assert (texts.memory == 0.5).all()


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "dangling", "nul", "long", "below a file"])
def test_paths_that_are_no_files_are_refused(texts, path, good, tmp_path, kind):
    other = tmp_path / "other"
    if kind == "folder":
        other.mkdir()
    elif kind == "pipe":
        os.mkfifo(other)
    elif kind in ("loop", "dangling", "device"):
        other.symlink_to({"loop": other, "dangling": tmp_path / "absent", "device": "/dev/zero"}[kind])
    else:
        other = {"nul": f"{path}\0", "long": tmp_path / ("x" * 5000), "below a file": path / "x"}[kind]
    with pytest.raises(StateFileError, match="cannot be read: |null byte"):
        texts.load(other)


TERABYTE = 2**40


def another_tensor(parts):
    at = len(parts.data)
    parts.outer["memory"] = {"dtype": "U8", "shape": [TERABYTE], "data_offsets": [at, at + TERABYTE]}


@pytest.mark.parametrize(
    "change, header, message",
    [
        (another_tensor, None, r"tensor 'memory' must be torch.float32 \[2, 2, 4\], got torch.uint8"),
        (lambda parts: None, None, r"tensors of \d+ bytes are declared, 1099511627\d+ are there"),
        (lambda parts: None, TERABYTE // 2, "a header of 549755813888 bytes in a file of 1099511"),
    ],
)
def test_a_file_of_a_terabyte_is_refused_before_it_is_read(texts, path, good, change, header, message):
    """Almost nothing of it is on the disk."""
    raw = changed(good, change)
    path.write_bytes(raw if header is None else struct.pack("<Q", header) + raw[8:])
    memory = 2 * 2 * 4 * 4 if change is another_tensor else 0
    os.truncate(path, len(raw) + TERABYTE - memory)
    with pytest.raises(StateFileError, match=message):
        texts.load(path)
    path.unlink()


def test_a_header_that_is_not_there_is_not_read(texts, path, good):
    path.write_bytes(struct.pack("<Q", 2**33) + good[8:])
    with pytest.raises(StateFileError, match=f"a header of {2**33} bytes in a file of {len(good)}"):
        texts.load(path)


def test_what_no_file_holds_is_not_saved(path):
    with pytest.raises(ValueError, match="tensor 'a' must be of a dtype that files hold, got torch.complex64"):
        files.save_tensors(path, {"a": torch.zeros(1, dtype=torch.complex64)}, {"kind": "test"})
    with pytest.raises(ValueError, match="metadata must not hold format, version, .* got 'version'"):
        files.save_tensors(path, {}, {"kind": "test", "version": 2})
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        files.save_tensors(path, {}, {"kind": "test", "loss": float("nan")})
    assert not path.exists()


# Golden files


def test_golden_tensors_load_and_are_what_is_written_today(path, same_bits):
    tensors, metadata = files.load_tensors(golden.TENSORS, kind="golden")
    assert same_bits(tensors, golden.tensors())
    assert {name: metadata[name] for name in golden.METADATA} == golden.METADATA
    files.save_tensors(path, golden.tensors(), golden.METADATA)
    assert same_meaning(files.load_tensors(path, kind="golden")[1], metadata)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_streams_load_and_are_what_is_written_today(kind, path, same_bits):
    texts, want = stream(golden.model(kind), 2), golden.texts(kind)
    metadata = texts.load(golden.path_of(kind))
    assert (metadata["stream_id"], metadata["step"], metadata["version"]) == ("golden", 11, 1)
    assert same_bits(texts.state(), want.state())
    assert texts.read(torch.tensor([[1, 2, 3, 4]] * 2)).isfinite().all()
    want.save(path, stream_id="golden", step=11)
    assert same_meaning(stream(golden.model(kind), 2).load(path), metadata)


def same_meaning(a, b):
    """Of metadata, whatever version of the package wrote it."""
    return all(
        {**a, "written_by": "", "digest": ""}[name] == {**b, "written_by": "", "digest": ""}[name] for name in a | b
    )


# A new process


SCRIPT = """
import sys, torch, memformer_kernels
torch.set_num_threads(1)
for kind in sys.argv[2:]:
    model = getattr(memformer_kernels, kind).from_pretrained(f"{sys.argv[1]}/{kind}").eval()
    texts = memformer_kernels.stream(model, 2)
    texts.load(f"{sys.argv[1]}/{kind}/texts")
    print(texts.read((torch.arange(26).view(2, 13) % 5)[:, 5:]).numpy().tobytes().hex())
"""


def test_a_new_process_goes_on_bit_for_bit(tmp_path):
    want = []
    for kind in KINDS:
        model = golden.model(kind)
        model.save_pretrained(tmp_path / kind.__name__)
        text, texts = torch.arange(26).view(2, 13) % 5, stream(model, 2)
        texts.read(text[:, :5])
        texts.save(tmp_path / kind.__name__ / "texts")
        want.append(texts.read(text[:, 5:]).numpy().tobytes().hex())
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *[kind.__name__ for kind in KINDS]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == want
