"""Trained models of bytes, from their folders."""

from pathlib import Path

import torch

from memformer_kernels.models import Memformer, MemformerLM
from memformer_kernels.models.pretrained import model_name


def load(folder: Path, device: torch.device) -> Memformer | MemformerLM:
    """The model of either class that lies in a folder, in evaluation mode."""
    models = {cls.__name__: cls for cls in (MemformerLM, Memformer)}
    name = model_name(folder)
    if name not in models:
        raise ValueError(f"{folder}: field 'model' must be one of {', '.join(models)}, got {name!r}")
    model = models[name].from_pretrained(folder).to(device).eval()
    if model.config.vocabulary != 256:
        raise ValueError(f"{folder}: is a model of {model.config.vocabulary} tokens, not of bytes (256)")
    return model
