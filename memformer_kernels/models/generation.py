"""Sampling from a model, token after token, with the memory carried: any length, constant memory."""

import math

import torch
from torch import Tensor

from memformer_kernels.models.decoding import Decoding
from memformer_kernels.models.recurrent import Recurrent


@torch.no_grad()
def generate(
    model: Recurrent,
    prompt: Tensor,
    length: int,
    *,
    decoding: Decoding | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Decoding]:
    """Continues a prompt. On a GPU the steps are CUDA graphs: recorded once for a decoding, replayed for each token.

    Args:
        model: a `MemformerLM` or `Memformer`, in evaluation mode.
        prompt: integer [B, P], P >= 1, any length: whole segments of it are read in parallel.
        length: tokens to make.
        decoding: what an earlier call returned, or `model.start`, to go on from there: `prompt` then follows what that
            call read. The last token that a call returns has not been read yet: it belongs at the start of the next
            prompt.
        temperature: 0 takes the most likely token.
        top_k: sample among the k most likely only.
        generator: the source of randomness; PyTorch's default one otherwise.

    Returns:
        The new tokens, int64 [B, length], and the decoding to go on from.

    Raises:
        ValueError: an argument breaks a rule above, or `decoding` is of another model; nothing has been read then.
    """
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"generate: prompt must be [B, P] with P >= 1, got {list(prompt.shape)}")
    for name, value, least in (("length", length, 0), ("temperature", temperature, 0), ("top_k", top_k, 1)):
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"generate: {name} must be at least {least}, got {value}")
    if decoding is not None and decoding.model is not model:
        raise ValueError("generate: decoding must be of this model, got one of another")
    if decoding is None:
        decoding = model.start(prompt.shape[0])
    logits = decoding.read_prompt(prompt)
    made = prompt.new_empty(prompt.shape[0], length, dtype=torch.int64)
    for i in range(length):
        made[:, i] = token = _sample(logits, temperature, top_k, generator)
        if i + 1 < length:
            logits = decoding.decode(token[:, None])
    return made, decoding


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
