"""Serving: many texts of many clients, in a fixed amount of memory."""

from memformer_kernels.serving.pool import Lease, StreamPool

__all__ = ["Lease", "StreamPool"]
