"""Bytes of real text, split by file into training and validation."""

import hashlib
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SEPARATOR = b"\0"  # between files; text holds none, which is also how a binary file is told
VALIDATION_SHARE = 20  # one file in 20


class DataError(ValueError):
    """Text that cannot be trained on; the message says why."""


@dataclass(frozen=True)
class Text:
    """Training and validation bytes, uint8 [N] each, and what they were read from."""

    train: Tensor
    validation: Tensor
    files: int
    skipped: int

    @classmethod
    def read(cls, paths: Sequence[str | Path] = ()) -> "Text":
        """Reads files, and all files below folders; by default the running interpreter's standard library.

        Binary files in a folder are skipped; one that is named is an error. A file goes to validation by the hash of
        its name, so the split stays the same when files are added. A single file is split near its end.
        """
        named = [Path(p) for p in paths]
        found = _standard_library() if not named else _find(named)
        contents, skipped = [], 0
        for name, path in found:
            content = _content(path)
            if SEPARATOR in content:
                if path in named:
                    raise DataError(f"{path}: is a binary file (it holds a zero byte); text is needed")
                skipped += 1
            elif content:
                contents.append((name, content))
        if not contents:
            where = ", ".join(map(str, named)) or "the standard library"
            raise DataError(f"{where}: no text found ({len(found)} files, {skipped} of them binary)")
        train, validation = _split(contents)
        return cls(_join(train), _join(validation), len(contents), skipped)


def _standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    return [(str(p.relative_to(root)), p) for p in sorted(root.rglob("*.py")) if not installed & set(p.parts)]


def _find(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    found = []
    for path in paths:
        if path.is_dir():
            below = sorted(
                p for p in path.rglob("*") if p.is_file() and not any(s.startswith(".") for s in p.parts[1:])
            )
            found += [(str(p.relative_to(path)), p) for p in below]
        elif path.exists():
            found.append((path.name, path))
        else:
            raise DataError(f"{path}: no such file or folder")
    return found


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _split(contents: list[tuple[str, bytes]]) -> tuple[list[bytes], list[bytes]]:
    contents = sorted(contents)
    random.Random(0).shuffle(contents)  # neighbours in a folder resemble each other
    in_validation = [int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0 for name, _ in contents]
    train = [c for (_, c), v in zip(contents, in_validation, strict=True) if not v]
    validation = [c for (_, c), v in zip(contents, in_validation, strict=True) if v]
    if train and validation:
        return train, validation
    whole = SEPARATOR.join(c for _, c in contents)
    cut = len(whole) - len(whole) // VALIDATION_SHARE
    return [whole[:cut]], [whole[cut:]]


def _join(contents: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(SEPARATOR.join(contents)), dtype=torch.uint8)
