"""What tests, benchmarks and the command `check` share: random calls of the ops, the float64 answer to them, and how
far a right result may be from it.

>>> case = make_case("memory_write", dtype=torch.bfloat16, masked=0.3)
>>> errors(run(case, backend="eager"), oracle(case))
{'output': 0.0017, 'query': 0.0021, ...}
>>> shares_of_bound(run(case, backend="eager"), oracle(case), error_bound(case))  # none may be above 1
{'output': 0.24, 'grad_query': 0.11, ...}
"""

from memformer_kernels.testing.cases import (
    Case,
    Result,
    call,
    cotangent,
    errors,
    make_case,
    oracle,
    relative_error,
    run,
    to_float64,
)
from memformer_kernels.testing.error_bound import error_bound, shares_of_bound

__all__ = [
    "Case",
    "Result",
    "call",
    "cotangent",
    "error_bound",
    "errors",
    "make_case",
    "oracle",
    "relative_error",
    "run",
    "shares_of_bound",
    "to_float64",
]
