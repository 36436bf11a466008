"""Embeddings of tokens and their positions in one kernel, and which word each token is, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memformer_kernels import launch
from memformer_kernels.layers.fused.triton import row_tile
from memformer_kernels.triton_helpers import wait_for_kernels_before


@triton.jit(do_not_specialize=["rows", "vocabulary"], debug=True)  # so that it looks at its assertion
def _embed_kernel(
    tokens,  # [rows]
    words,  # [vocabulary, C]
    places,  # [at least length, C]
    embedded,  # [rows, C], words[token] + places[row % length]
    rows,
    vocabulary,
    length,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.load(tokens + row, mask=row < rows, other=0)
    known = (token >= 0) & (token < vocabulary)
    tl.device_assert(known, "embed: a token is not in the vocabulary")
    channels = tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows)[:, None] & (channels < C)
    found = words + token.to(tl.int64)[:, None] * C + channels
    word = tl.load(found, mask=inside & known[:, None], other=float("nan")).to(tl.float32)
    place = tl.load(places + (row % length)[:, None] * C + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(embedded + row[:, None] * C + channels, (word + place).to(embedded.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def _one_hot_kernel(tokens, hot, rows, vocabulary, BLOCK: tl.constexpr, ROWS: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_kernels_before(OVERLAPS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.load(tokens + row, mask=row < rows, other=-1)
    words = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (words < vocabulary)
    is_it = (words == token[:, None]).to(hot.dtype.element_ty)
    tl.store(hot + row[:, None] * vocabulary + words, is_it, mask=inside)


@launch.planned
def _embed_plan(rows, length, sizes, dtypes, device) -> launch.Launcher:
    vocabulary, width = sizes
    tile = row_tile(width)
    return launch.Launcher(_embed_kernel, -(-rows // tile["ROWS"]), (rows, vocabulary, length), C=width, **tile)


def embed(tokens: Tensor, words: Tensor, places: Tensor) -> Tensor:
    """words[tokens] + places[0, 1, ...], [B * L, C], of contiguous integers [B, L] and tables of one dtype."""
    rows, length = tokens.numel(), tokens.shape[1]
    embedded = words.new_empty(rows, words.shape[1])
    if embedded.numel():
        plan = _embed_plan(rows, length, tuple(words.shape), (tokens.dtype, words.dtype), words.device)
        plan(tokens, words, places, embedded)
    return embedded


@launch.planned
def _one_hot_plan(rows, vocabulary, dtypes, device) -> launch.Launcher:
    block = triton.next_power_of_2(vocabulary)
    tile = {"BLOCK": block, "ROWS": max(1, 2048 // block), "num_warps": 4}
    return launch.Launcher(_one_hot_kernel, -(-rows // tile["ROWS"]), (rows, vocabulary), **tile)


def one_hot(tokens: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """[tokens, vocabulary], 1 where a token is that word and 0 elsewhere, of contiguous integers."""
    hot = tokens.new_empty(tokens.numel(), vocabulary, dtype=dtype)
    if hot.numel():
        _one_hot_plan(tokens.numel(), vocabulary, (tokens.dtype, dtype), tokens.device)(tokens, hot)
    return hot
