"""What users would pick instead: each peer is a function of the tensors and options of the op's public function."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import memformer_kernels
from memformer_kernels.backend import explain
from memformer_kernels.benchmarking import flash_lse
from memformer_kernels.benchmarking.suite import BACKWARD, FORWARD, NO_BIAS, SAVING, Shape
from memformer_kernels.testing import Case

OURS = "ours"
EPS = 1e-12
FORGETTING_ONLY = (FORWARD, SAVING, BACKWARD)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    name: unique within the op.
    make: `make(shape, device, compile)` gives the function; what it makes is not timed.
    passes: those it takes part in.
    compiled: whether `make` calls `compile`.
    context: entered round every use.
    cpu: whether it runs on a CPU: forward, and gradients too.
    """

    name: str
    make: Callable[[Shape, torch.device, Callable], Callable[..., Tensor]]
    passes: tuple[str, ...] = (FORWARD, NO_BIAS, SAVING, BACKWARD)
    compiled: bool = False
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext
    cpu: tuple[bool, bool] = field(default=(True, True))


def compile_afresh(function: Callable) -> Callable:
    """`torch.compile` for one shape; a part that cannot be fused raises instead of running unfused."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def not_compiled(function: Callable) -> Callable:
    return function


def ours(op: str, device: torch.device, backend: str = "auto") -> Implementation:
    """The public function; on a CPU the definition."""
    backend = "eager" if device.type == "cpu" else backend
    public = getattr(memformer_kernels, op)
    return Implementation(OURS, lambda *_: lambda **arguments: public(**arguments, backend=backend))


def backend_of_ours(case: Case, backend: str = "auto") -> str:
    """The backend that runs `ours` on this case of a GPU."""
    return explain(case.op, **case.tensors, **case.options).backend if backend == "auto" else backend


# memory_read


def sdpa_read(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


def plain_read(query, key, value):
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value


def flex_read(query, key, value):
    return flex_attention(query, key, value)


# memory_write


def normalise(z: Tensor) -> Tensor:
    return F.normalize(z, dim=-1, eps=EPS)


def plain_write(query, own_key, slots, key, value, bias=None, temperature=1.0):
    own = split_heads(slots, query)
    logits = torch.cat([(query * own_key).sum(-1, keepdim=True), query @ key.mT], -1)
    weights = torch.softmax(logits * (query.shape[-1] ** -0.5 / temperature), -1)
    attended = join_heads(weights[..., :1] * own + weights[..., 1:] @ value)
    return attended if bias is None else normalise(attended + bias)


def make_masked_write(shape: Shape, device: torch.device, compile: Callable):
    """Attention over the slots' own keys and the tokens, with a dense mask; the normalisation is compiled."""
    own = torch.eye(shape.M, dtype=torch.bool, device=device)
    mask = torch.cat([own, own.new_ones(shape.M, shape.L)], 1)
    forget = compile(lambda attended, bias: normalise(join_heads(attended) + bias))

    def masked_write(query, own_key, slots, key, value, bias=None, temperature=1.0):
        keys, values = torch.cat([own_key, key], 2), torch.cat([split_heads(slots, query), value], 2)
        scale = query.shape[-1] ** -0.5 / temperature
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        return join_heads(attended) if bias is None else forget(attended, bias)

    return masked_write


def make_flex_write(shape: Shape, device: torch.device, compile: Callable):
    """The same with FlexAttention and its block mask, compiled as a whole."""
    count = shape.M

    def sees(batch, head, slot, key):
        return (key >= count) | (key == slot)

    block_mask = create_block_mask(sees, None, None, count, count + shape.L, device=device)

    @compile
    def flex_write(query, own_key, slots, key, value, bias=None, temperature=1.0):
        keys, values = torch.cat([own_key, key], 2), torch.cat([split_heads(slots, query), value], 2)
        scale = query.shape[-1] ** -0.5 / temperature
        attended = join_heads(flex_attention(query, keys, values, block_mask=block_mask, scale=scale))
        return attended if bias is None else normalise(attended + bias)

    return flex_write


def split_heads(slots: Tensor, like: Tensor) -> Tensor:
    """[B, M, C] to [B, H, M, D], the shape of `like`; a view."""
    return slots.unflatten(-1, (like.shape[1], like.shape[3])).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, M, D] to [B, M, C]."""
    return x.transpose(1, 2).flatten(-2)


# memory_forget


def plain_forget(slots, bias):
    z = slots.float() + bias.float()
    return (z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(EPS)).to(slots.dtype)


def _plain(name: str, function: Callable, **options) -> Implementation:
    return Implementation(name, lambda *_: function, **options)


def _compiled(name: str, function: Callable, **options) -> Implementation:
    return Implementation(name, lambda shape, device, compile: compile(function), compiled=True, **options)


def _sdpa(name: str, backend: SDPBackend, **options) -> Implementation:
    return Implementation(name, lambda *_: sdpa_read, context=lambda: sdpa_kernel(backend), **options)


PEERS: dict[str, tuple[Implementation, ...]] = {
    "memory_read": (
        _sdpa("FlashAttention-2", SDPBackend.FLASH_ATTENTION),
        _sdpa("cuDNN", SDPBackend.CUDNN_ATTENTION, cpu=(False, False)),
        _sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION, cpu=(False, False)),
        _compiled("compiled eager", plain_read),
        _compiled("FlexAttention", flex_read, cpu=(True, False)),
    ),
    "memory_write": (
        _plain("eager", plain_write, passes=FORGETTING_ONLY),
        _compiled("compiled eager", plain_write, passes=FORGETTING_ONLY),
        Implementation("concat + mask", make_masked_write, compiled=True),
        Implementation("flash + lse", lambda shape, device, compile: flash_lse.make(compile), compiled=True),
        Implementation("FlexAttention", make_flex_write, FORGETTING_ONLY, compiled=True, cpu=(True, False)),
    ),
    "memory_forget": (
        _plain("eager", plain_forget),
        _compiled("compiled eager", plain_forget),
    ),
}
