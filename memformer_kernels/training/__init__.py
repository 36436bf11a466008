"""Training a `MemformerLM` on text or on the recall task: the loop, its checkpoints, its validation."""

from memformer_kernels.training.settings import Settings
from memformer_kernels.training.trainer import Trainer

__all__ = ["Settings", "Trainer"]
