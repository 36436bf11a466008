"""Tensors in files: safetensors with a SHA-256 of every tensor, written atomically, checked before anything is used.

safetensors alone loads a file with a flipped bit without a word; the digests are what makes damage visible.
"""

import hashlib
import importlib.metadata
import json
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

VERSION = 1
MOST_HEADER_BYTES = 100_000_000  # as in safetensors
OWN_FIELDS = ("format", "version", "written_by", "digests", "digest")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StateFileError(ValueError):
    """A file that cannot be loaded; the message names the file, what is wrong, what was expected and what was found."""


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Writes tensors (copied to the CPU) and JSON metadata, which must hold the file's `kind`.

    Raises `ValueError` for a dtype that files cannot hold, for metadata with NaN or with a field of the format's own.
    """
    safetensors = _safetensors()
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{path}: tensor {name!r} must be of a dtype that files hold, got {tensor.dtype}")
    if taken := sorted(metadata.keys() & set(OWN_FIELDS)):
        raise ValueError(f"{path}: metadata must not hold {', '.join(OWN_FIELDS)}, got {taken[0]!r}")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {
        "format": "memformer_kernels",
        "version": VERSION,
        "written_by": _package_version(),
        "digests": {name: digest(name, tensor) for name, tensor in tensors.items()},
        **metadata,
    }
    header["digest"] = _header_digest(header)
    content = safetensors.save(tensors, metadata={"memformer_kernels": json.dumps(header, allow_nan=False)})
    write_atomically(path, content)


def load_tensors(
    path: str | Path, *, kind: str, expected: Mapping[str, Tensor] | None = None, finite: bool = False
) -> tuple[dict[str, Tensor], dict]:
    """`(tensors, metadata)` of a file that `save_tensors` wrote, on the CPU.

    `expected` gives the names, shapes and dtypes that must be there, no more and no less; a file of others is refused
    before its tensors are read, however large it is. `finite` refuses NaN and infinities. Raises `StateFileError` for
    a missing, damaged or foreign file.
    """
    path = Path(path)
    safetensors = _safetensors()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise StateFileError(f"{path}: cannot be read: not a regular file")
        with open(path, "rb") as file:
            head, schema, header = _read_header(path, file)
            _check_header(path, schema, header, kind)
            if expected is not None:
                check_expected(path, schema, expected)
            tensors = safetensors.load(head + file.read())
    except OSError as error:
        raise StateFileError(f"{path}: cannot be read: {error.strerror}") from None
    except StateFileError:
        raise
    except Exception as error:  # whatever a hostile header can make JSON, safetensors or torch raise
        reason = f"{type(error).__name__}: {error}"
        raise StateFileError(f"{path}: not a file of memformer_kernels, or damaged ({reason})") from None
    for name, tensor in tensors.items():
        if digest(name, tensor) != header["digests"][name]:
            raise StateFileError(f"{path}: damaged: tensor {name!r} does not match its SHA-256")
        if finite and not all_finite(tensor):
            raise StateFileError(f"{path}: tensor {name!r} must be finite, got NaN or infinity")
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


def digest(name: str, tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, and of its name, dtype and shape."""
    result = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    if tensor.numel():
        result.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return result.hexdigest()


def all_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.double().isfinite().all())


def _read_header(path: Path, file: BinaryIO) -> tuple[bytes, dict[str, Tensor], dict]:
    """The bytes before the tensors, tensors without data for what is declared, and the metadata."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(MOST_HEADER_BYTES, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    raw = file.read(length)
    fields = _strict_json(raw.decode("utf-8"))
    header = _strict_json(fields.pop("__metadata__")["memformer_kernels"])
    if not isinstance(header, dict) or not isinstance(header["digests"], dict):
        raise ValueError("no metadata")
    schema = {
        name: torch.empty(field["shape"], dtype=DTYPES[field["dtype"]], device="meta") for name, field in fields.items()
    }
    declared = sum(t.numel() * t.element_size() for t in schema.values())
    if declared != size - 8 - length:
        raise ValueError(f"tensors of {declared} bytes are declared, {size - 8 - length} are there")
    return length.to_bytes(8, "little") + raw, schema, header


def _check_header(path: Path, schema: Mapping[str, Tensor], header: Mapping[str, object], kind: str) -> None:
    for field, want in (("format", "memformer_kernels"), ("version", VERSION), ("kind", kind)):
        got = header.get(field)
        if got != want or type(got) is not type(want):  # JSON's true is 1 too
            raise StateFileError(f"{path}: field {field!r} must be {want!r}, got {got!r}")
    if header.get("digest") != _header_digest(header):
        raise StateFileError(f"{path}: damaged: the metadata does not match its SHA-256")
    if header["digests"].keys() != schema.keys():
        raise StateFileError(f"{path}: damaged: the tensors are not those that were saved")


def _strict_json(text: str) -> object:
    """Of what every reader reads alike: no name twice in an object, no NaN."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name stands twice in an object")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse)


def _header_digest(header: Mapping[str, object]) -> str:
    """Of all metadata but the digest itself."""
    rest = {name: value for name, value in header.items() if name != "digest"}
    as_loaded = json.loads(json.dumps(rest, allow_nan=False))  # keys that were numbers are strings, and sorted as such
    return hashlib.sha256(json.dumps(as_loaded, sort_keys=True).encode()).hexdigest()


def _package_version() -> str:
    try:
        return importlib.metadata.version("memformer-kernels")
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        return "unknown"


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"saving and loading needs safetensors: pip install 'memformer-kernels[io]' ({error})"
        ) from None
    return safetensors.torch
