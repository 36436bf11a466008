"""`generate`: a trained model continues a prompt of bytes."""

import sys
from pathlib import Path

import torch

from memformer_kernels.cli import byte_models
from memformer_kernels.models import generate as continue_prompt

CHUNK = 64  # bytes between two writes to the terminal


def generate(
    folder: Path, prompt: bytes, length: int, temperature: float, top_k: int | None, seed: int, device: torch.device
) -> None:
    if not prompt:
        raise ValueError("generate: the prompt must hold at least one byte")
    model = byte_models.load(folder, device)
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([list(prompt)], device=device)
    decoding = None
    _write(prompt)
    while length > 0:
        chunk = min(CHUNK, length)
        made, decoding = continue_prompt(
            model, tokens, chunk, decoding=decoding, temperature=temperature, top_k=top_k, generator=generator
        )
        _write(bytes(made[0].tolist()))
        tokens, length = made[:, -1:], length - chunk
    _write(b"\n")


def _write(content: bytes) -> None:
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
