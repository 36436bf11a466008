"""What the models are trained on: bytes of real text, and the recall task."""

from memformer_kernels.data.lanes import Lanes
from memformer_kernels.data.recall import RecallTask
from memformer_kernels.data.text import DataError, Text

__all__ = ["DataError", "Lanes", "RecallTask", "Text"]
