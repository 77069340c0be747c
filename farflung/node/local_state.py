"""What is this member's own: inner optimiser tensors, error feedback, counters.

Two generations of one self-checking safetensors file. A new one never touches the one before it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from farflung.node.durable import make_directory, replacing, sweep
from farflung.node.tensorfile import check_seal, read_header, read_into, tensor_entry, write_sealed
from farflung.protocol import limits
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import ConfigError, PeerError

if TYPE_CHECKING:
    from torch import Tensor

_KEEP = 2
_META_BYTES_MAX = limits.CONTROL_BYTES_MAX


class LocalState(NamedTuple):
    """A checkpoint: tensors on the CPU, and whatever the node noted beside them."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class LocalStates:
    """The checkpoints of one member in one run."""

    def __init__(self, directory: Path) -> None:
        self._directory = make_directory(directory)
        sweep(directory)

    def _paths(self) -> list[Path]:
        return sorted(self._directory.glob("state-*.safetensors"))

    def write(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Keep a checkpoint; on the disk when this returns. Tensors may be on any device, `meta` must be canonical.

        On failure, a full disk say, the checkpoint before it stays the newest.
        """
        paths = self._paths()
        number = int(paths[-1].stem.removeprefix("state-")) + 1 if paths else 0
        entries = [tensor_entry(name, tensor) for name, tensor in tensors.items()]
        entries.sort(key=lambda entry: -entry.width)  # wide ones first: then every tensor is aligned
        with replacing(self._directory / f"state-{number:08d}.safetensors") as handle:
            write_sealed(handle, entries, encode_canonical(dict(meta)).decode("ascii"))
        for path in paths[: 1 - _KEEP]:
            path.unlink(missing_ok=True)

    def read(self) -> tuple[LocalState | None, str]:
        """The newest whole checkpoint (None: there is none), and why newer ones were passed over ("": there are none).

        The one before the newest is of an earlier round: look at its meta.
        """
        problems: list[str] = []
        for path in reversed(self._paths()):
            try:
                return _read(path), "; ".join(problems)
            except (ConfigError, PeerError, OSError, KeyError) as error:
                problems.append(f"{path.name}: {error}")
        return None, "; ".join(problems)


def _read(path: Path) -> LocalState:
    import torch

    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check_seal(handle)
        places, metadata = read_header(handle)
        tensors = {}
        for name, place in places.items():
            tensors[name] = torch.empty(place.shape, dtype=getattr(torch, place.torch_name))
            read_into(handle, place, tensors[name].reshape(-1).view(torch.uint8).numpy().data)
        return LocalState(tensors, decode_canonical(metadata["text"].encode("ascii"), bytes_max=_META_BYTES_MAX))
    finally:
        os.close(handle)
