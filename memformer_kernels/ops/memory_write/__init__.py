from memformer_kernels.ops.memory_write.api import memory_write

__all__ = ["memory_write"]
