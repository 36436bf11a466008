"""What is around the kernels in CUDA C++, on a CPU: when they run, what is copied for them, what they are handed, and
what is made of their results."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layouts import LAYOUTS, contiguous, gaps

from memformer_kernels.testing import make_case, run

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton")  # has the stages around the backward of the write


def cuda_backend(op):
    return importlib.import_module(f"memformer_kernels.ops.{op}.cuda")


def test_slots_of_a_block_are_those_of_the_kernels():
    headers = "".join((ROOT / f"csrc/include/memformer_kernels/memory_{op}.h").read_text() for op in ("read", "write"))
    sizes = re.findall(r"constexpr int kMemory\w+Backward(?:Alone|Slots) = (\d+);", headers)
    assert sizes == ["128", "1024", "128"] and cuda_backend("memory_read").ALONE == 128


@pytest.mark.guarantee("G14")
@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"is_cuda": False}, "query must be on a CUDA device, got cuda:0"),
        ({"dtype": torch.float32}, "query must be float16 or bfloat16, got torch.float32"),
        ({"slots": 64}, "at least 65 slots"),
        ({"missing": "not compiled"}, "not compiled"),
        ({"width": 129}, "query must have at most 128 channels a head, got 129"),
        ({"architecture": 80}, "the GPU must have compute capability 9.0"),
        ({"architecture": 100}, "the GPU must have compute capability 9.0"),
        ({"compiled_for": "80;90"}, "the CUDA kernels must be compiled for 90a, got 80;90"),
    ],
)
@pytest.mark.parametrize("op", ["memory_read", "memory_write"])
def test_kernel_says_what_it_cannot_take(monkeypatch, op, change, reason):
    cuda = cuda_backend(op)
    got = dict(is_cuda=True, dtype=torch.bfloat16, slots=128, width=128, architecture=90, compiled_for="80;90a")
    got |= {"missing": None} | change

    def tensor(rows):
        sizes = dict(shape=(1, 1, rows, got["width"]), device=torch.device("cuda", 0))
        return SimpleNamespace(is_cuda=got["is_cuda"], dtype=got["dtype"], **sizes)

    tokens, slots = tensor(5), tensor(got["slots"])
    limits = dict(memory_read_max_channels=128, memory_write_backward_slots=128, architectures=got["compiled_for"])
    monkeypatch.setattr(cuda.triton, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(cuda._extension, "why_not", lambda: got["missing"])
    monkeypatch.setattr(cuda._extension, "load", lambda: SimpleNamespace(**limits))
    monkeypatch.setattr(cuda.tiles, "architecture", lambda _: got["architecture"])
    if op == "memory_read":
        found = cuda.unsupported_reason(tokens, slots, slots, None, 1.0, False)
    else:
        found = cuda.unsupported_reason(slots, slots, None, tokens, tokens, None, None, 1.0, 1e-12, False)
    assert found is None if reason is None else reason in found


@pytest.mark.guarantee("G14")
@pytest.mark.parametrize("tokens, slots, taken", [(511, 64, False), (512, 64, True), (512, 1, True), (1, 65, True)])
def test_few_slots_of_the_write_need_many_tokens(monkeypatch, tokens, slots, taken):
    write = cuda_backend("memory_write")
    rows = {n: SimpleNamespace(shape=(1, 1, n, 64), device=torch.device("cuda", 0)) for n in (tokens, slots)}
    query, key = rows[slots], rows[tokens]
    query.is_cuda, query.dtype = True, torch.bfloat16
    monkeypatch.setattr(write.triton, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(write._extension, "why_not", lambda: None)
    monkeypatch.setattr(write._extension, "load", lambda: SimpleNamespace(memory_read_max_channels=128))
    monkeypatch.setattr(write, "unsupported_device", lambda _: None)
    reason = write.unsupported_reason(query, query, None, key, key, None, None, 1.0, 1e-12, False)
    assert reason is None if taken else "at least 65 slots or 512 tokens, got 64 and 511" in reason


def _bfloat16(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "copied"),
    [
        (lambda: _bfloat16(2, 3, 5, 16), False),
        (lambda: _bfloat16(2, 5, 3, 16).transpose(1, 2), False),
        (lambda: _bfloat16(2, 3, 5, 48)[..., 16:32], False),
        (lambda: _bfloat16(1, 1, 1, 16).as_strided((1, 1, 1, 16), (0, 3, 5, 1)), False),  # nothing moves
        (lambda: _bfloat16(2, 3, 5, 12), True),  # rows of one and a half vectors
        (lambda: _bfloat16(2, 3, 5, 20)[..., :16], True),
        (lambda: _bfloat16(2, 3, 5, 24)[..., 4:20], True),
        (lambda: _bfloat16(2, 3, 16, 5).mT, True),
        (lambda: _bfloat16(2, 1, 5, 16).expand(2, 3, 5, 16), True),
        (lambda: _bfloat16().expand(2, 3, 5, 16), True),
    ],
)
def test_backward_copies_what_tma_cannot(make, copied):
    in_vectors, tensor = importlib.import_module("memformer_kernels.hopper").in_vectors, make()
    taken = in_vectors(tensor)
    D = tensor.shape[3]
    assert (taken is not tensor) == copied
    assert taken.shape == (*tensor.shape[:3], -(-D // 8) * 8)
    assert torch.equal(taken[..., :D], tensor) and not taken[..., D:].any()
    if copied:
        assert in_vectors(taken) is taken


@pytest.fixture(scope="module")
def compiled_for_cpu(tmp_path_factory):
    """The bindings over `kernels_on_cpu.cpp`; in the folder that `KERNELS_ON_CPU` names they are compiled once for all
    that name it."""
    pybind11, nvcc = pytest.importorskip("pybind11"), shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc, which knows where CUDA's headers are, is not on PATH")
    folder = Path(os.environ.get("KERNELS_ON_CPU") or tmp_path_factory.mktemp("kernels_on_cpu"))
    path = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        _compile_for_cpu(nvcc, pybind11.get_include(), path)
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile_for_cpu(nvcc: str, pybind11: str, path: Path) -> None:
    includes = (ROOT / "csrc/include", pybind11, sysconfig.get_paths()["include"])
    command = [nvcc, "-std=c++20", "-O1", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    command += ['-DMEMFORMER_KERNELS_ARCHITECTURES="90a"', *(f"-I{folder}" for folder in includes)]
    sources = ROOT / "csrc/bindings.cpp", ROOT / "tests/kernels_on_cpu.cpp"
    part = path.with_name("part.so")  # in its place only once it is whole
    done = subprocess.run([*command, *map(str, sources), "-o", str(part)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    part.rename(path)


@pytest.fixture
def on_cpu(compiled_for_cpu, monkeypatch, nothing_left_over, registered):
    """`on_cpu(case)`: through the CUDA backend of the op, with kernels that compute on the CPU."""
    from memformer_kernels import _extension, launch

    monkeypatch.setattr(_extension, "load", lambda: compiled_for_cpu)
    monkeypatch.setattr(_extension, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    for op in ("memory_read", "memory_write"):
        for name in ("CHUNK", "WIDE_CHUNK", "CHUNK_ALONE"):
            monkeypatch.setattr(cuda_backend(op), name, 64, raising=False)
    for name in ("CHUNK_OF_SLOT", "WIDE_CHUNK_OF_SLOT"):
        monkeypatch.setattr(cuda_backend("memory_write"), name, 1)
    launch.forget_plans()
    yield lambda case: run(case, function=registered(case.op, "cuda"))
    launch.forget_plans()


@pytest.mark.guarantee("G1", "G11")
@pytest.mark.parametrize("layout", [contiguous, *LAYOUTS])
@pytest.mark.parametrize(
    "op, sizes",
    [
        ("memory_read", dict(slots=65, tokens=130, masked=0.4)),  # in chunks
        ("memory_read", dict(slots=128, tokens=64, width=20)),
        ("memory_read", dict(slots=129, tokens=65, masked=0.4)),  # with the output
        ("memory_read", dict(slots=330, tokens=70, width=20)),
        ("memory_read", dict(slots=1100, tokens=3, masked=0.4)),  # groups of slots
        ("memory_read", dict(slots=70, tokens=0)),
        ("memory_read", dict(slots=330, tokens=0)),
        ("memory_write", dict(slots=65, tokens=130, masked=0.4)),
        ("memory_write", dict(slots=70, tokens=64, width=20, bias=False)),
        ("memory_write", dict(slots=66, tokens=1, carried_dtype=torch.float32)),
        ("memory_write", dict(slots=70, tokens=300, width=8, masked=0.95)),  # also the forward in chunks
        ("memory_write", dict(slots=129, tokens=130, width=16, carried_dtype=torch.float32)),  # only the forward
        ("memory_write", dict(slots=140, tokens=150, width=20, masked=0.4)),  # tokens stay on chip
        ("memory_write", dict(slots=192, tokens=1100, width=8, batch=1)),  # in groups
        ("memory_write", dict(slots=129, tokens=60, width=8)),
        ("memory_write", dict(slots=0, tokens=3)),
        ("memory_write", dict(slots=70, tokens=0)),
        ("memory_forget", dict(batch=33)),  # in groups
        ("memory_forget", dict(batch=0)),
        ("memory_read", dict(slots=70, tokens=66, width=72, masked=0.4)),
        ("memory_write", dict(slots=40, tokens=300, width=8, masked=0.4)),  # only the forward, in chunks
    ],
)
def test_what_python_hands_to_the_kernels_is_right(on_cpu, op, sizes, layout, within_bound):
    case = make_case(op, **{"batch": 2, "heads": 2, "dtype": torch.float16} | sizes)
    case = case.map(lambda t: layout(t) if t.numel() else t)
    within_bound(on_cpu(case), case)


@pytest.mark.parametrize("layout", [contiguous, gaps])
@pytest.mark.parametrize(
    "op, slots", [("memory_read", 70), ("memory_read", 130), ("memory_write", 70), ("memory_write", 130)]
)
def test_saved_tensors_come_back_in_another_layout(on_cpu, op, slots, layout, within_bound):
    """As they do from `save_on_cpu(pin_memory=True)`, and may from other hooks."""
    case = make_case(op, batch=2, heads=3, slots=slots, tokens=70, dtype=torch.float16)
    with torch.autograd.graph.saved_tensors_hooks(layout, lambda tensor: tensor):
        result = on_cpu(case)
    within_bound(result, case)


@pytest.mark.parametrize(
    "op, sizes",
    [
        ("memory_read", dict(slots=70, tokens=70)),
        ("memory_read", dict(slots=330, tokens=70)),
        ("memory_write", dict(slots=70, tokens=70)),
        ("memory_write", dict(slots=130, tokens=300)),
    ],
)
def test_a_launcher_is_never_given_none_for_a_tensor(on_cpu, registered, monkeypatch, op, sizes):
    """Nor a tensor for None: on a GPU it keeps the variant that Triton compiled for its first call."""
    from memformer_kernels import launch

    given, call = {}, launch.Launcher.__call__

    def watched(self, *tensors):
        nones = [tensor is None for tensor in tensors]
        assert given.setdefault(self, nones) == nones, self.kernel.__name__
        call(self, *tensors)

    monkeypatch.setattr(launch.Launcher, "__call__", watched)
    case = make_case(op, batch=1, heads=1, width=8, dtype=torch.float16, **sizes)
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            if grad:
                on_cpu(case)
            else:
                registered(op, "cuda")(**case.tensors, **case.options)
    assert given


@pytest.mark.guarantee("G8")
@pytest.mark.parametrize("channels", [8, 64, 65, 128])
def test_chunks_of_the_writes_kernels_are_whole_tiles(channels, monkeypatch):
    write = cuda_backend("memory_write")
    monkeypatch.setattr(write._extension, "load", lambda: SimpleNamespace(memory_write_forward_tokens=128))
    monkeypatch.setattr(write.tiles, "multiprocessors", lambda device: 132)
    for tokens in (1, 511, 513, 4096, 65536, 100_001):
        size = write._chunk(tokens, channels)
        assert size % 64 == 0 and -(-tokens // size) <= 32 and (size <= 1024 or size * 31 < tokens + 64 * 32)
        for heads, slots in ((1, 1), (1, 65), (16, 128), (16, 129), (200, 4096)):
            size = write._chunk_forward(tokens, heads, slots, channels, None)
            assert size % 128 == 0 and size >= 8 * slots
            assert -(-tokens // size) <= {1: 32, 16: 8, 200: 1}[heads]
