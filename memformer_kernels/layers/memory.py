"""The memory's own layers: what tokens read it through, and how a segment is written into it."""

import math

import torch
from torch import Tensor, nn

from memformer_kernels.layers import fused
from memformer_kernels.ops.memory_read import memory_read
from memformer_kernels.ops.memory_write import memory_write
from memformer_kernels.ops.precision import wide

KeyValue = tuple[Tensor, Tensor]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, C] to [B, H, L, D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, L, D] to [B, L, C]."""
    return x.transpose(1, 2).flatten(-2)


class MemoryProjection(nn.Module):
    """Keys and values of the memory for every layer that reads it, in one matrix product.

    The memory is constant while a segment is read, so `[B * M, C] x [C, 2 * layers * C]` serves them all. It passes
    a LayerNorm first: slots have unit norm, entries near C ** -0.5, and without it the model hardly learns to read.
    """

    def __init__(self, width: int, heads: int, layers: int = 1):
        super().__init__()
        self.heads, self.layers = heads, layers
        self.norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * layers * width, bias=False)

    def forward(self, memory: Tensor) -> list[KeyValue]:
        """Memory [B, M, C] to (key, value) of each layer, each [B, H, M, D], views of one tensor."""
        _, projected = fused.residual_norm_linear(memory, None, self.norm, self.key_value)
        split = [split_heads(p, self.heads) for p in projected.chunk(2 * self.layers, -1)]
        return list(zip(split[::2], split[1::2], strict=True))


class MemoryRead(nn.Module):
    """Tokens read the memory; the caller adds the residual.

        output = memory_read(x W_Q, LN(m) W_K, LN(m) W_V) W_O

    Alone it holds its own `MemoryProjection`; with `projection=False` it is handed the keys and values that a
    model's one projection made for it.
    """

    def __init__(self, width: int, heads: int, *, projection: bool = True, backend: str = "auto"):
        super().__init__()
        _check_heads("MemoryRead", width, heads)
        self.heads, self.backend = heads, backend
        self.projection = MemoryProjection(width, heads) if projection else None
        self.query = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, memory: Tensor | KeyValue, *, slot_mask: Tensor | None = None) -> Tensor:
        """Tokens x [B, L, C] and a memory [B, M, C], or its (key, value), each [B, H, M, D], to [B, L, C]."""
        if isinstance(memory, Tensor):
            if self.projection is None:
                raise TypeError("MemoryRead: memory must be (key, value) when projection=False, got a tensor")
            ((key, value),) = self.projection(memory)
        else:
            key, value = memory
        return fused.linear(self.attend(fused.linear(x, self.query), key, value, slot_mask=slot_mask), self.output)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, slot_mask: Tensor | None = None) -> Tensor:
        """Between the projections: query [B, L, C], key and value [B, H, M, D], to [B, L, C]."""
        query = split_heads(query, self.heads)
        return merge_heads(memory_read(query, key, value, slot_mask=slot_mask, backend=self.backend))


class MemoryWrite(nn.Module):
    """Writes a segment into the memory: slot attention, then forgetting. Also holds the initial memory.

    Args:
        width, heads, slots: C, H, M.
        temperature: divides the logits of the write; below 1 it sharpens the choice between keeping and writing.
        retention: norm that every slot's bias starts with. A slot that is not written turns towards its bias with
            half-life `ln 2 / ln(1 + retention)` segments: 0.1 gives 7.3, 0.3 gives 2.6, 0.02 gives 35. It is learned.
        forgetting: without it the slots are not normalised, and a slot that is not written stays as it is.
        own_value: what a slot keeps of itself, "slots" (version 2 of the paper) or "projected" (version 1).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        slots: int,
        *,
        temperature: float = 0.25,
        retention: float = 0.1,
        forgetting: bool = True,
        own_value: str = "slots",
        backend: str = "auto",
    ):
        super().__init__()
        _check_heads("MemoryWrite", width, heads)
        if own_value not in ("slots", "projected"):
            raise ValueError(f"MemoryWrite: own_value must be 'slots' or 'projected', got {own_value!r}")
        if not retention > 0:
            raise ValueError(
                f"MemoryWrite: retention must be above 0, got {retention}; forgetting=False switches it off"
            )
        self.heads, self.temperature, self.forgetting, self.own_value = heads, temperature, forgetting, own_value
        self.backend = backend
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(nn.functional.normalize(torch.randn(slots, width), dim=-1) * retention)
        # slots have unit norm where tokens have norm sqrt(C), so their first logits are small: every slot starts as
        # nearly the mean of its segment. Queries at the tokens' scale were tried, and learned less
        for projection in (self.query, self.key, self.value):
            nn.init.normal_(projection.weight, std=width**-0.5)

    @classmethod
    def from_config(cls, config) -> "MemoryWrite":
        """The writer of a model's configuration."""
        names = ("width", "heads", "slots", "temperature", "retention", "forgetting", "own_value", "backend")
        return cls(**{name: getattr(config, name) for name in names})

    def initial_memory(self, batch: int) -> Tensor:
        """bias / ||bias|| for every row of the batch, [B, M, C], in the bias' dtype, under autocast too."""
        unit = nn.functional.normalize(wide(self.bias), dim=-1).to(self.bias.dtype)
        return unit.expand(batch, -1, -1)

    def forward(self, memory: Tensor, x: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Memory [B, M, C] and the segment's final states x [B, L, C] to the next memory, [B, M, C]."""
        projected = *fused.linears(memory, self.query, self.key), *fused.linears(x, self.key, self.value)
        query, own_key, key, value = (split_heads(p, self.heads) for p in projected)
        return memory_write(
            query,
            own_key,
            memory if self.own_value == "slots" else fused.linear(memory, self.value).to(memory.dtype),
            key,
            value,
            bias=self.bias if self.forgetting else None,
            token_mask=token_mask,
            temperature=self.temperature,
            backend=self.backend,
        )

    def half_life(self) -> Tensor:
        """Segments after which half of an unwritten slot's angle to its bias is gone, for every slot, [M]."""
        return math.log(2) / torch.log1p(self.bias.detach().norm(dim=-1))


def _check_heads(layer: str, width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{layer}: width must be a multiple of heads, got {width} and {heads}")
