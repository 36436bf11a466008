"""Compiles every Triton kernel as the ops launch it, for GPUs that need not be there, and prints what came out.

    python tests/compile_triton.py --architectures 80 89 90 100

Each op is called on CPU tensors, with the launch replaced by one that records its arguments; what is recorded is
compiled ahead of time. One JSON line a kernel, dtype and shape.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter would take the kernels' place

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from memformer_kernels import launch, tiles
from memformer_kernels.layers.fused import embedding, grouped, segment_attention
from memformer_kernels.layers.fused import triton as fused
from memformer_kernels.ops.memory_forget import triton as forget
from memformer_kernels.ops.memory_read import triton as read
from memformer_kernels.ops.memory_write import triton as write

MEMORY = re.compile(r"\b(ld|st|atom|red|cp|prefetch)\.(global|async)")  # what looks at global memory
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.bool: "i1", torch.int64: "i64"}


def recorded(architecture, call):
    """`(kernel, arguments, constants)` of each launch that `call` makes on a GPU of this architecture."""
    launches = []
    was = launch.Launcher.__call__, tiles.architecture
    launch.Launcher.__call__ = lambda self, *tensors: launches.append(
        (self.kernel, (*tensors, *self.arguments), self.constants | {"OVERLAPS": architecture >= 90})
    )
    tiles.architecture = lambda device: architecture
    launch.forget_plans()
    try:
        call()
    finally:
        launch.Launcher.__call__, tiles.architecture = was
        launch.forget_plans()
    return launches


def source(kernel, arguments, constants):
    """The `ASTSource` and options of a launch, specialised as a launch specialises its arguments."""
    signature, constexprs, attributes = {}, {}, {}

    def describe(value, path, specialise):
        if value is None:
            constexprs[path] = None
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, i), specialise) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if specialise and value == 1:
            constexprs[path] = 1
            return "constexpr"
        if specialise and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"

    names = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
    options = {name: value for name, value in constants.items() if name in names} | {"debug": bool(kernel.debug)}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constexprs[i,] = constants[parameter.name]
        else:
            signature[parameter.name] = describe(arguments[i], (i,), not parameter.do_not_specialize)
    source_of = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return source_of(kernel, signature, constexprs, attributes), options


def facts(kernel, arguments, constants, architecture):
    """What the compiled kernel uses. `stack` counts bytes a thread that did not fit its registers."""
    ast, options = source(kernel, arguments, constants)
    compiled = triton.compile(ast, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    return {
        "kernel": kernel.__name__,
        "architecture": architecture,
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "wgmma": "wgmma.mma_async" in ptx,
        "mma": "mma.sync" in ptx or "tcgen05.mma" in ptx,
        "tf32": "tf32" in ptx,
        "waits": "griddepcontrol.wait" in ptx,
        "waits_first": not MEMORY.search(ptx.partition("griddepcontrol.wait")[0]),
        "constants": constants,
    }


def calls(dtype, B, H, M, L, D, masked, allow_tf32=False):
    """Every op, forward and backward, as closures by name."""
    per_token = torch.empty(B, L, H, D, dtype=dtype).transpose(1, 2)
    per_slot = torch.empty(B, M, H, D, dtype=dtype).transpose(1, 2)
    memory, bias = torch.empty(B, M, H * D, dtype=dtype), torch.empty(M, H * D, dtype=dtype)
    mask = torch.ones(B, M, dtype=torch.bool) if masked else None
    token_mask = torch.ones(B, L, dtype=torch.bool) if masked else None
    options = 0.125, allow_tf32
    read_call = per_token, per_slot, per_slot, mask
    write_call = per_slot, per_slot, memory, per_token, per_token, bias, token_mask
    statistics = torch.empty(B, H, M)

    def read_backward():
        saves, _ = read.saves(per_token, per_slot)
        saved = (per_token, torch.empty(B, H, L), per_token) if saves else (None, None, None)
        read.backward(per_token, *read_call, *saved, *options)

    def write_backward():
        saved = torch.empty(B, M, H * D), statistics, statistics, statistics, torch.empty(B, M)
        write.backward(memory, *write_call, *saved, 0.125, 1e-12, allow_tf32)

    rows, weight = memory.flatten(0, 1), torch.empty(H * D, dtype=dtype)
    tokens = torch.empty(B, M, dtype=torch.int64)
    of_rows, of_columns = torch.empty(B * M), torch.empty(H * D)
    segment, projected = min(L, 128), torch.empty(B * min(L, 128), 3 * H * D, dtype=dtype)
    pieces = {
        "self-attention forward": lambda: segment_attention.forward(projected, segment, H, True),
        "self-attention backward": lambda: segment_attention.backward(
            projected[:, : H * D].contiguous(), projected, segment, H, True
        ),
    }
    if dtype.itemsize == 2:
        products = [(rows, rows, torch.empty(H * D, H * D))] * 2
        pieces["grouped products"] = lambda: grouped.products(products)
    return (pieces if segment_attention.fits(segment, D, dtype) else {}) | {
        "residual_norm forward": lambda: fused.residual_norm_forward(rows, rows, weight, weight, 1e-5, dtype, True),
        "residual_norm backward": lambda: fused.residual_norm_backward(
            rows, rows, rows, of_rows, of_rows, weight, weight, True
        ),
        "embed": lambda: embedding.embed(tokens, rows, rows),
        "one hot": lambda: embedding.one_hot(tokens, 256, dtype),
        "column sums": lambda: fused.column_sums(rows[:, None], None),
        "grouped column sums": lambda: grouped.column_sums([(rows, of_columns), (rows, of_columns)]),
        "gelu forward": lambda: fused.gelu_forward(rows),
        "gelu backward": lambda: fused.gelu_backward(rows, rows, True),
        "memory_read forward": lambda: read.forward(*read_call, *options, True),
        "memory_read backward": read_backward,
        "memory_write forward": lambda: write.forward(*write_call, 0.125, 1e-12, allow_tf32, True),
        "memory_write backward": write_backward,
        "memory_forget forward": lambda: forget.forward(memory, bias, 1e-12),
        "memory_forget backward": lambda: forget.backward(memory, memory, bias, torch.empty(B, M), 1e-12),
    }


# Head width, slots, tokens, hidden ones: every kernel, whole tiles and parts of one, one tile of slots and several
SHAPES = (
    (64, 64, 512, False),
    (128, 128, 4096, True),
    (64, 300, 4096, False),
    (24, 5, 33, True),
    (256, 64, 500, False),
)
WIDE_SHAPES = ((64, 16, 512, False), (64, 128, 4096, False), (128, 32, 512, False), (128, 128, 4096, False))
WIDE_SHAPES += ((128, 300, 4096, False), (64, 128, 5000, False), (64, 256, 512, False), (128, 200, 4096, False))
MANY_ROWS = (17, 4), (17, 64)  # a batch added up in groups; slots of 256 and 4096 channels


def report(architectures):
    """Each kernel and variant once. The architecture that is tuned is looked at more closely."""
    for architecture in architectures:
        seen = set()
        shapes = SHAPES + (WIDE_SHAPES if architecture == 90 else ())
        cases = [(torch.bfloat16, shape, False) for shape in shapes]
        cases += [(torch.float32, SHAPES[i], allow_tf32) for i, allow_tf32 in ((0, False), (2, False), (0, True))]
        cases = [(2, 4, *case) for case in cases] + [(*rows, torch.float32, SHAPES[2], False) for rows in MANY_ROWS]
        for B, H, dtype, (D, M, L, masked), allow_tf32 in cases:
            for name, call in calls(dtype, B, H, M, L, D, masked, allow_tf32).items():
                if (B, H) in MANY_ROWS and not name.startswith("memory_write"):
                    continue
                for kernel, arguments, constants in recorded(architecture, call):
                    ast, options = source(kernel, arguments, constants)
                    key = str((kernel.__name__, ast.signature, ast.constants, ast.attrs, options))
                    if key not in seen:
                        seen.add(key)
                        row = {"op": name, "dtype": str(dtype)[6:], "D": D, "M": M, "L": L, "masked": masked}
                        yield row | {"allow_tf32": allow_tf32} | facts(kernel, arguments, constants, architecture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 89, 90, 100])
    for line in report(parser.parse_args().architectures):
        print(json.dumps(line), flush=True)
