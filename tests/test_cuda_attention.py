"""The Python side of the attention kernels in CUDA C++, on a CPU: when they run, what is copied for them, and what is
made of their results."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from memformer_kernels.testing import make_case, oracle, run

pytest.importorskip("triton")  # has the forward of few slots, and the stages around the backward of the write


def cuda_backend(op):
    return importlib.import_module(f"memformer_kernels.ops.{op}.cuda")


def test_slots_of_a_block_are_those_of_the_kernels():
    root = Path(__file__).parents[1] / "csrc/include/memformer_kernels"
    headers = "".join((root / f"memory_{op}.h").read_text() for op in ("read", "write"))
    sizes = re.findall(r"constexpr int kMemory\w+Backward(?:Alone|Slots) = (\d+);", headers)
    assert sizes == ["128", "1024", "128"] and cuda_backend("memory_read").ALONE == 128


@pytest.mark.guarantee("G14")
@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"is_cuda": False}, "query must be on a CUDA device, got cuda:0"),
        ({"dtype": torch.float32}, "query must be float16 or bfloat16, got torch.float32"),
        ({"slots": 64}, {"memory_read": "key must have at least 65 slots, got 64", "memory_write": "65 to 128 slots"}),
        ({"slots": 129}, {"memory_read": None, "memory_write": "query must have 65 to 128 slots, got 129"}),
        ({"missing": "not compiled"}, "not compiled"),
        ({"width": 129}, "query must have at most 128 channels a head, got 129"),
        ({"architecture": 80}, "the GPU must have compute capability 9.0"),
        ({"architecture": 100}, "the GPU must have compute capability 9.0"),
        ({"compiled_for": "80;90"}, "the CUDA kernels be compiled for 90a, got 80;90"),
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
    reason = reason[op] if isinstance(reason, dict) else reason
    assert found is None if reason is None else reason in found


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
    in_vectors, tensor = cuda_backend("memory_read").in_vectors, make()
    taken = in_vectors(tensor)
    D = tensor.shape[3]
    assert (taken is not tensor) == copied
    assert taken.shape == (*tensor.shape[:3], -(-D // 8) * 8)
    assert torch.equal(taken[..., :D], tensor) and not taken[..., D:].any()
    if copied:
        assert in_vectors(taken) is taken


def over_tokens(query, du, key, value, token_mask, log_sum_exp, delta, scale):
    """What the kernel of the write's backward computes, by its definition."""
    weights = (scale * (query @ key.mT - log_sum_exp[..., None])).exp()
    scores = weights * (du @ value.mT - delta[..., None])
    if token_mask is not None:
        hidden = ~token_mask[:, None, None, :]
        weights, scores = weights.masked_fill(hidden, 0), scores.masked_fill(hidden, 0)
    chunk = cuda_backend("memory_write")._chunk(key.shape[2], key.shape[3])
    parts = [s @ k for s, k in zip(scores.split(chunk, -1), key.split(chunk, 2), strict=True)]
    return torch.stack(parts).transpose(2, 3).contiguous(), scale * scores.mT @ query, weights.mT @ du


@pytest.mark.guarantee("G1")
@pytest.mark.parametrize("change", [{}, {"tokens": 64}, {"masked": 0.4}, {"bias": False}, {"slots": 0}, {"tokens": 0}])
def test_stages_around_the_writes_kernel_are_right(monkeypatch, nothing_left_over, registered, agree, change):
    cuda = cuda_backend("memory_write")
    monkeypatch.setattr(cuda, "_over_tokens", over_tokens)
    monkeypatch.setattr(cuda, "CHUNK", 64)
    case = make_case("memory_write", **{"slots": 9, "tokens": 150} | change)  # in three chunks
    agree(run(case, function=registered("memory_write", "cuda")), oracle(case))


@pytest.mark.guarantee("G8")
@pytest.mark.parametrize("channels", [8, 64, 65, 128])
def test_chunks_of_the_writes_kernel_are_whole_tiles(channels):
    chunk = cuda_backend("memory_write")._chunk
    for tokens in (1, 511, 513, 4096, 65536, 100_001):
        size = chunk(tokens, channels)
        assert size % 64 == 0 and -(-tokens // size) <= 32 and (size <= 1024 or size * 31 < tokens + 64 * 32)
