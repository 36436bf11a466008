"""Memformer as one writes it in plain PyTorch, and its rollouts: what benchmarks compare with.

Pre-norm layers with `scaled_dot_product_attention`, a write with concatenated own slot, `torch.utils.checkpoint`, and
memory replay as a loop. Wu et al., arXiv 2010.06891v2, section 3 and algorithm 1.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.output = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: Tensor, context: Tensor, causal: bool = False) -> Tensor:
        query, key, value = (self.split(t) for t in (self.query(x), *self.key_value(context).chunk(2, -1)))
        attended = scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.output(attended.transpose(1, 2).flatten(-2))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.self_attention, self.cross_attention = Attention(width, heads), Attention(width, heads)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.causal = causal

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normalised = self.norms[0](x)
        x = x + self.self_attention(normalised, normalised, self.causal)
        x = x + self.cross_attention(self.norms[1](x), context)
        return x + self.feed_forward(self.norms[2](x))


class Write(nn.Module):
    def __init__(self, width: int, heads: int, slots: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(slots, width))

    def forward(self, memory: Tensor, x: Tensor) -> Tensor:
        given = self.query(memory), self.key(memory), memory, self.key(x), self.value(x)
        query, own_key, own_value, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in given)
        logits = torch.cat([(query * own_key).sum(-1, keepdim=True), query @ key.transpose(-1, -2)], -1)
        weights = (logits * (4 * query.shape[-1] ** -0.5)).softmax(-1)
        written = weights[..., :1] * own_value + weights[..., 1:] @ value
        return normalize(written.transpose(1, 2).flatten(-2) + self.bias, dim=-1)


class PlainMemformerLM(nn.Module):
    """Decoder only."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, slots: int):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.layers = nn.ModuleList(Layer(width, heads, causal=True) for _ in range(layers))
        self.write = Write(width, heads, slots)

    def initial_memory(self, batch: int) -> Tensor:
        return normalize(self.write.bias, dim=-1).expand(batch, -1, -1)

    def forward(self, segment: tuple[Tensor, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
        tokens, targets = segment
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, memory)
        loss = cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())
        return loss, self.write(memory, x)


class PlainMemformer(nn.Module):
    """Encoder and decoder."""

    def __init__(self, vocabulary: int, width: int, heads: int, encoder: int, decoder: int, slots: int):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.encoder = nn.ModuleList(Layer(width, heads, causal=False) for _ in range(encoder))
        self.decoder = nn.ModuleList(Layer(width, heads, causal=True) for _ in range(decoder))
        self.write = Write(width, heads, slots)

    initial_memory = PlainMemformerLM.initial_memory

    def forward(self, segment: tuple[Tensor, Tensor, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
        source, target, labels = segment
        states = self.embedding(source)
        for layer in self.encoder:
            states = layer(states, memory)
        x = self.embedding(target)
        for layer in self.decoder:
            x = layer(x, states)
        loss = cross_entropy(self.head(x).flatten(0, 1).float(), labels.flatten())
        return loss, self.write(memory, states)


def back_propagate(cell, segments: list, memory: Tensor) -> None:
    total = 0.0
    for segment in segments:
        loss, memory = cell(segment, memory)
        total = total + loss
    (total / len(segments)).backward()


def back_propagate_from_checkpoints(cell, segments: list, memory: Tensor) -> None:
    back_propagate(lambda segment, m: checkpoint(cell, segment, m, use_reentrant=False), segments, memory)


def replay(cell, segments: list, memory: Tensor) -> None:
    memories = [memory.detach()]
    with torch.no_grad():
        for segment in segments[:-1]:
            memories.append(cell(segment, memories[-1])[1])
    grad = None
    for t in reversed(range(len(segments))):
        given = memories[t].requires_grad_() if t else memory
        loss, following = cell(segments[t], given)
        roots, grads = [loss / len(segments)], [None]
        if grad is not None:
            roots, grads = [*roots, following], [None, grad]
        torch.autograd.backward(roots, grads)
        grad, memories[t] = given.grad if t else None, None


METHODS = {"bptt": back_propagate, "checkpoint": back_propagate_from_checkpoints, "replay": replay}
