"""Tensors in files: safetensors with a SHA-256 of every tensor, written atomically, checked before anything is used.

safetensors alone loads a file with a flipped bit without a word; the digests are what makes damage visible.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

VERSION = 1


class StateFileError(ValueError):
    """A file that cannot be loaded; the message names the file, what is wrong, what was expected and what was found."""


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Writes tensors (copied to the CPU) and JSON metadata, which must hold the file's `kind`."""
    safetensors = _safetensors()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {
        "format": "memformer_kernels",
        "version": VERSION,
        "digests": {name: _digest(name, tensor) for name, tensor in tensors.items()},
        **metadata,
    }
    header["digest"] = _header_digest(header)
    write_atomically(path, safetensors.save(tensors, metadata={"memformer_kernels": json.dumps(header)}))


def load_tensors(
    path: str | Path, *, kind: str, expected: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict]:
    """`(tensors, metadata)` of a file that `save_tensors` wrote, on the CPU.

    `expected` gives the names, shapes and dtypes that must be there, no more and no less. Raises `StateFileError`
    for a missing, damaged or foreign file.
    """
    path = Path(path)
    safetensors = _safetensors()
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StateFileError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        tensors = safetensors.load(raw)
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["memformer_kernels"])
        digests = dict(header["digests"])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise StateFileError(f"{path}: not a file of memformer_kernels, or damaged ({reason})") from None
    for field, want in (("format", "memformer_kernels"), ("version", VERSION), ("kind", kind)):
        if header.get(field) != want:
            raise StateFileError(f"{path}: field {field!r} must be {want!r}, got {header.get(field)!r}")
    if header.get("digest") != _header_digest(header):
        raise StateFileError(f"{path}: damaged: the metadata does not match its SHA-256")
    if digests.keys() != tensors.keys():
        raise StateFileError(f"{path}: damaged: the tensors are not those that were saved")
    for name, tensor in tensors.items():
        if _digest(name, tensor) != digests[name]:
            raise StateFileError(f"{path}: damaged: tensor {name!r} does not match its SHA-256")
    if expected is not None:
        check_expected(path, tensors, expected)
    return tensors, header


def write_atomically(path: str | Path, content: bytes) -> None:
    """The file is the old one or the new one, never half of either, whatever happens in between."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_expected(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            want, got = ("no such tensor", "one") if name in tensors else ("a tensor", "none")
            raise StateFileError(f"{path}: tensor {name!r}: expected {want}, got {got}")
        want, got = expected[name], tensors[name]
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            raise StateFileError(
                f"{path}: tensor {name!r} must be {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
            )


def _header_digest(header: Mapping[str, object]) -> str:
    """Of all metadata but the digest itself."""
    rest = {name: value for name, value in header.items() if name != "digest"}
    as_loaded = json.loads(json.dumps(rest))  # keys that were numbers are strings, and sorted as such
    return hashlib.sha256(json.dumps(as_loaded, sort_keys=True).encode()).hexdigest()


def _digest(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    if tensor.numel():
        digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"saving and loading needs safetensors: pip install 'memformer-kernels[io]' ({error})"
        ) from None
    return safetensors.torch
