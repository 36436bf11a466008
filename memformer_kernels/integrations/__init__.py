"""Drop-in acceleration of models written elsewhere, one folder a package."""

from memformer_kernels.integrations.api import accelerate, restore
from memformer_kernels.integrations.attention import cross_attention
from memformer_kernels.integrations.report import Report

__all__ = ["Report", "accelerate", "cross_attention", "restore"]
