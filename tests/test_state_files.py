import errno
import hashlib
import json
import os
import stat
import struct
import threading

import pytest
import torch

from memformer_kernels.state import StateFileError, files

pytestmark = pytest.mark.guarantee("G17")

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


@pytest.fixture
def small(path):
    tensors = {"memory": torch.randn(2, 3), "step": torch.tensor(7)}
    files.save_tensors(path, tensors, {"kind": "test", "stream": 5})
    return tensors


def load(path, kind="test", **options):
    return files.load_tensors(path, kind=kind, **options)


# What is saved comes back.


def test_every_dtype_comes_back_bit_for_bit(path, same_bits):
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
    tensors["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    files.save_tensors(path, tensors, {"kind": "test"})
    assert same_bits(load(path)[0], tensors)


def test_every_shape_and_layout_comes_back(path, same_bits):
    base = torch.randn(4, 6)
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "transposed": base.mT,
        "strided": base[:, ::2],
        "expanded": base[:1].expand(4, 6),
        "parameter": torch.nn.Parameter(base),
        'ünï 中"\\\n': torch.ones(1),
    }
    files.save_tensors(path, tensors, {"kind": "test"})
    assert same_bits(load(path)[0], tensors)


def test_tensors_that_share_memory_come_back(path, same_bits):
    base = torch.randn(4, 6)
    tensors = {"whole": base, "again": base, "row": base[1]}
    files.save_tensors(path, tensors, {"kind": "test"})
    assert same_bits(load(path)[0], tensors)


def test_metadata_comes_back(path, small):
    metadata = load(path)[1]
    assert metadata["kind"] == "test" and metadata["stream"] == 5
    assert metadata["format"] == "memformer_kernels" and metadata["version"] == files.VERSION


def test_saving_twice_gives_the_same_file(path, small):
    before = path.read_bytes()
    files.save_tensors(path, small, {"kind": "test", "stream": 5})
    assert path.read_bytes() == before


# A damaged file never loads.


def test_no_flipped_bit_is_loaded(path):
    files.save_tensors(path, {"m": torch.randn(2)}, {"kind": "test", "step": 5})
    good, unnoticed = path.read_bytes(), []
    load(path)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            load(path)
            unnoticed.append((bit, good[max(0, bit // 8 - 10) : bit // 8 + 10]))
        except StateFileError:
            pass
    assert not unnoticed


def test_no_truncated_or_longer_file_is_loaded(path, small):
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(StateFileError, match="damaged"):
            load(path)
    for extra in (b"\0", b" ", good):
        path.write_bytes(good + extra)
        with pytest.raises(StateFileError, match="damaged"):
            load(path)


def test_swapped_tensors_are_not_loaded(path):
    files.save_tensors(path, {"a": torch.zeros(3), "b": torch.ones(3)}, {"kind": "test"})
    raw = path.read_bytes()
    path.write_bytes(raw[:-24] + raw[-12:] + raw[-24:-12])
    with pytest.raises(StateFileError, match="tensor '[ab]' does not match its SHA-256"):
        load(path)


def test_edited_metadata_is_not_loaded(path, small):
    raw = path.read_bytes()
    edited = raw.replace(rb"\"stream\": 5", rb"\"stream\": 6")
    assert edited != raw
    path.write_bytes(edited)
    with pytest.raises(StateFileError, match="damaged: the metadata does not match its SHA-256"):
        load(path)


def test_missing_file_is_named(path):
    with pytest.raises(StateFileError, match=r"state.safetensors: cannot be read: No such file"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"PK\3\4" + b"\0" * 100, b"{}"])
def test_foreign_bytes_are_not_loaded(path, content):
    path.write_bytes(content)
    with pytest.raises(StateFileError, match="not a file of memformer_kernels, or damaged"):
        load(path)


def test_foreign_safetensors_file_is_not_loaded(path):
    save = pytest.importorskip("safetensors.torch").save_file
    save({"a": torch.ones(3)}, path)
    with pytest.raises(StateFileError, match="not a file of memformer_kernels, or damaged"):
        load(path)
    save({"a": torch.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(StateFileError, match="not a file of memformer_kernels, or damaged"):
        load(path)


def test_other_kind_and_version_are_named(path, small, monkeypatch):
    with pytest.raises(StateFileError, match="field 'kind' must be 'model', got 'test'"):
        load(path, kind="model")
    monkeypatch.setattr(files, "VERSION", 2)
    with pytest.raises(StateFileError, match="field 'version' must be 2, got 1"):
        load(path)


def test_tensors_must_be_those_expected(path, small):
    memory, step = small.values()
    assert load(path, expected=small)[0].keys() == small.keys()
    for expected, message in [
        ({**small, "bias": memory}, "tensor 'bias': expected a tensor, got none"),
        ({"memory": memory}, "tensor 'step': expected no such tensor, got one"),
        (
            {"memory": memory[:1], "step": step},
            r"tensor 'memory' must be torch.float32 \[1, 3\], got torch.float32 \[2, 3\]",
        ),
        (
            {"memory": memory.double(), "step": step},
            r"tensor 'memory' must be torch.float64 \[2, 3\], got torch.float32 \[2, 3\]",
        ),
    ]:
        with pytest.raises(StateFileError, match=message):
            load(path, expected=expected)


@pytest.mark.parametrize("change", ["drop", "add"])
def test_tensor_without_its_digest_is_not_loaded(path, small, change):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["memformer_kernels"])
    if change == "drop":
        del inner["digests"]["step"]
    else:
        inner["digests"]["other"] = hashlib.sha256().hexdigest()
    header["__metadata__"]["memformer_kernels"] = json.dumps(inner)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])
    with pytest.raises(StateFileError, match="damaged"):
        load(path)


# Writing is all or nothing.


def fail_with(error):
    def fail(*arguments):
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_while_writing_leaves_the_old_file_and_nothing_else(path, small, monkeypatch, step, error):
    old = path.read_bytes()
    monkeypatch.setattr(os, step, fail_with(error))
    with pytest.raises(type(error)):
        files.save_tensors(path, {"memory": torch.zeros(5)}, {"kind": "test"})
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_file_is_on_disk_before_it_takes_the_name(path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(("fsync", os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(("replace", b)), replace(a, b)))
    files.write_atomically(path, b"0123456789")
    assert steps[:2] == [("fsync", 10), ("replace", path)]
    assert path.read_bytes() == b"0123456789"


def test_many_threads_may_write_one_file(path):
    contents, failures, barrier = [bytes([i]) * 50_000 for i in range(8)], [], threading.Barrier(8)

    def work(content):
        barrier.wait()
        for _ in range(5):
            try:
                files.write_atomically(path, content)
            except OSError as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert path.read_bytes() in contents
    assert list(path.parent.iterdir()) == [path]


def test_file_gets_the_usual_permissions(path, small, tmp_path):
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)
