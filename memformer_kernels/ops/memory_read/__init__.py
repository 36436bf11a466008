from memformer_kernels.ops.memory_read.api import memory_read

__all__ = ["memory_read"]
