"""safetensors files, written straight from the tensors' memory: nothing model-sized is copied.

The format: header length (8 bytes, little endian) ‖ JSON header padded with spaces to a multiple of 8 ‖ the tensors'
bytes, one after the other. `safetensors.safe_open` reads what `write_tensors` writes; a test holds it to that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from farflung.node.durable import read_at, write_all, write_all_at
from farflung.protocol import limits
from farflung.protocol.errors import ConfigError, LocalError

_HEADER_BYTES_MAX = 16 << 20
_SLAB = 8 << 20
_SHORT = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_LONG = {short: name for name, short in _SHORT.items()}
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Entry(NamedTuple):
    """One tensor to write. `bytes_of` is called when its turn comes, so that only one is moved off a GPU at a time."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes_of: Callable[[], memoryview]

    @property
    def width(self) -> int:
        """Bytes of one element."""
        return _WIDTHS[self.dtype]

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.width


class Stored(NamedTuple):
    """Where one tensor lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def torch_name(self) -> str:
        """The dtype's name in torch and numpy."""
        return _LONG[self.dtype]


def float_vector(name: str, value: Any) -> Entry:
    """A flat fp32 vector (numpy, or a torch tensor on the CPU), not copied. Raises LocalError for anything else."""
    array = value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)
    if array.dtype != np.float32 or array.ndim != 1 or not array.flags.c_contiguous:
        raise LocalError(f"{name}: a contiguous fp32 vector is needed, got {array.dtype} {array.shape}")
    return Entry(name, "F32", array.shape, lambda: array.view(np.uint8).data)


def tensor_entry(name: str, tensor: Any) -> Entry:
    """A torch tensor (or numpy array) of any usual dtype on any device. Raises LocalError for an odd dtype."""
    dtype = _SHORT.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise LocalError(f"{name}: dtype {tensor.dtype} cannot be kept")

    def bytes_of() -> Any:
        if not hasattr(tensor, "detach"):
            return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
        import torch

        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return Entry(name, dtype, tuple(tensor.shape), bytes_of)


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Everything before the first tensor."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for entry in entries:
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + entry.size]}
        at += entry.size
    if len(fields) != len(entries) + 1:
        raise LocalError(f"tensor names that clash: {sorted(entry.name for entry in entries)}")
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    handle: int, entries: Sequence[Entry], metadata: Mapping[str, str], seen: Callable[[memoryview], None]
) -> None:
    """Write a file from its start; `seen` is shown the tensors' bytes, a slab at a time, on the way."""
    write_all(handle, header(entries, metadata))
    for entry in entries:
        view = entry.bytes_of()
        if view.nbytes != entry.size:
            raise LocalError(f"{entry.name}: {view.nbytes} bytes where its shape says {entry.size}")
        for start in range(0, view.nbytes, _SLAB):
            slab = view[start : start + _SLAB]
            seen(slab)
            write_all(handle, slab)


def read_header(handle: int) -> tuple[dict[str, Stored], dict[str, str]]:
    """Where the tensors lie, in the file's order, and the metadata. Raises ConfigError if the file is damaged."""
    size = os.fstat(handle).st_size
    length = int.from_bytes(read_at(handle, 8, 0), "little")
    if not 0 < length <= min(_HEADER_BYTES_MAX, size):
        raise ConfigError(f"a header of {length} bytes in a file of {size}")
    try:
        fields = json.loads(read_at(handle, length, 8))
        metadata = {str(key): str(text) for key, text in fields.pop("__metadata__", {}).items()}
        stored = {name: _stored(item, 8 + length) for name, item in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"a damaged header: {error}") from None
    if any(place.stop > size for place in stored.values()):
        raise ConfigError(f"a file of {size} bytes that is cut short")
    return dict(sorted(stored.items(), key=lambda item: item[1].start)), metadata


def _stored(item: dict[str, Any], base: int) -> Stored:
    start, stop = (base + int(offset) for offset in item["data_offsets"])
    stored = Stored(str(item["dtype"]), tuple(int(axis) for axis in item["shape"]), start, stop)
    if stop - start != math.prod(stored.shape) * _WIDTHS[stored.dtype]:
        raise ValueError(f"offsets {start}..{stop} for {stored.shape}")
    return stored


def read_into(handle: int, place: Stored, view: memoryview) -> None:
    """Read one tensor into a view of bytes that is there already. Raises ConfigError if the file is cut short."""
    at = place.start
    while view:
        count = os.preadv(handle, [view[: 1 << 30]], at)
        if count == 0:
            raise ConfigError(f"the file ends at {at}")
        view, at = view[count:], at + count


def slabs(handle: int, start: int, stop: int) -> Iterator[bytes]:
    """The file's bytes from `start` to `stop`, a slab at a time."""
    for at in range(start, stop, _SLAB):
        yield read_at(handle, min(_SLAB, stop - at), at)


_BLANK = "0" * 64


def write_sealed(handle: int, entries: Sequence[Entry], text: str) -> None:
    """Write a file that can tell whether it is whole: the SHA-256 of all its bytes (itself blank) is in its header."""
    if len(entries) > 4 * limits.TENSORS_MAX:
        raise LocalError(f"{len(entries)} tensors in one file")
    blank = header(entries, {"text": text, "seal": _BLANK})
    whole = hashlib.sha256(blank)
    write_tensors(handle, entries, {"text": text, "seal": _BLANK}, whole.update)
    write_all_at(handle, header(entries, {"text": text, "seal": whole.hexdigest()}), 0)


def check_seal(handle: int) -> None:
    """Raise ConfigError unless the file is what `write_sealed` wrote."""
    places, metadata = read_header(handle)
    base = min((place.start for place in places.values()), default=os.fstat(handle).st_size)
    seal = metadata.get("seal", "")
    blank = read_at(handle, base, 0).replace(f'"seal":"{seal}"'.encode(), f'"seal":"{_BLANK}"'.encode(), 1)
    whole = hashlib.sha256(blank)
    for slab in slabs(handle, base, os.fstat(handle).st_size):
        whole.update(slab)
    if whole.hexdigest() != seal:
        raise ConfigError("its seal is broken")
