from memformer_kernels.ops.memory_forget.api import memory_forget

__all__ = ["memory_forget"]
