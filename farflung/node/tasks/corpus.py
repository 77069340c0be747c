"""The source text of the Python standard library that is installed here: real data, nothing to download.

The text depends on the Python version; its digest says which one it is.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farflung.protocol.errors import ConfigError

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
    | {"ensurepip", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo", "lib-dynload"}
)
"""Installed packages, tests, tables of generated numbers, and what distributions leave out."""

SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")
"""Files that differ from machine to machine."""

VALIDATION_ONE_IN = 50
"""About 2 % of the files, by the hash of their path, are kept for validation."""

CORPUS_BYTES_MAX = 64 << 20
"""Six times the standard library of Python 3.14: beyond this we are reading something else."""


class Corpus(NamedTuple):
    """Two texts of bytes, files joined by a zero byte in the order of their paths, and a digest of both."""

    train: npt.NDArray[np.uint8]
    validation: npt.NDArray[np.uint8]
    digest: bytes
    files: int


@lru_cache(maxsize=2)
def read_corpus(root: str | None = None) -> Corpus:
    """Every Python file under `root` (default: the standard library), about 8 MB, in about 0.1 s.

    Raises ConfigError if there is no source text to read.
    """
    folder = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    train, validation = bytearray(), bytearray()
    digest = hashlib.sha256()
    names = _list_sources(folder)
    for name in names:
        data = (folder / name).read_bytes()
        part = validation if _is_validation(name) else train
        part += data + b"\0"
        digest.update(b"%s\0%d\0" % (name.encode(), len(data)) + data)
        if len(train) + len(validation) > CORPUS_BYTES_MAX:
            raise ConfigError(f"more than {CORPUS_BYTES_MAX} bytes of Python source under {folder}")
    if not train or not validation:
        raise ConfigError(f"no Python source text to train on under {folder}")
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), digest.digest(), len(names))


class Windows:
    """A map-style dataset of non-overlapping windows: window i is bytes [i * context, (i + 1) * context], one more
    than `context`, because every byte but the first is a target."""

    def __init__(self, text: npt.NDArray[np.uint8], context: int) -> None:
        if len(text) <= context:
            raise ConfigError(f"a context of {context} bytes is longer than the text of {len(text)}")
        self._text, self._context = text, context
        self._offset = np.arange(context + 1)

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._context

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        start_b1 = np.asarray(indices, dtype=np.int64)[:, None] * self._context
        return torch.from_numpy(self._text[start_b1 + self._offset].astype(np.int64))


def _list_sources(folder: Path) -> list[str]:
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        for file in files:
            if file.endswith(".py") and not file.startswith(SKIPPED_PREFIXES):
                names.append((Path(parent) / file).relative_to(folder).as_posix())
    return sorted(names)


def _is_validation(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % VALIDATION_ONE_IN == 0
