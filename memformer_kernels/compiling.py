"""What `torch.compile` is told about functions of this package, without importing it: it takes as long as PyTorch."""

from collections.abc import Callable
from typing import TypeVar

from torch._compile import _disable_dynamo

Function = TypeVar("Function", bound=Callable)


def constant(function: Function) -> Function:
    """As `torch.compiler.assume_constant_result`: the result is a constant to what is compiled."""
    function._dynamo_marked_constant = True
    return function


def never_compiled(function: Function) -> Function:
    """As `torch.compiler.disable`: runs in Python, and what it calls too."""
    return _disable_dynamo(function)
