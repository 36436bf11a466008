"""What is kept: state files."""

from memformer_kernels.state.files import StateFileError

__all__ = ["StateFileError"]
