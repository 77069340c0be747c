"""An optimiser's state as tensors for safetensors and JSON: exact, and without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from farflung.protocol.errors import LocalError

NESTING_MAX = 6
"""How deep optimiser state may nest; torch's own needs three."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as CPU tensors for safetensors and JSON without floats: no pickle. Exact.

    CPU tensors share memory with the optimiser. Raises LocalError for state that is neither tensors nor plain data.
    """
    tensors: dict[str, Tensor] = {}
    state = optimizer.state_dict()
    shapes = [[list(part.shape), str(part.dtype)] for group in optimizer.param_groups for part in group["params"]]
    packed = {key: _pack(state[key], key, tensors, NESTING_MAX) for key in ("state", "param_groups")}
    return tensors, {"kind": type(optimizer).__name__, "parameters": shapes, **packed}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], value: Mapping[str, Any]
) -> None:
    """The inverse of `optimizer_tensors`; the tensors are copied. Raises LocalError if it is another optimiser's."""
    shapes = [[list(part.shape), str(part.dtype)] for group in optimizer.param_groups for part in group["params"]]
    try:
        if value["kind"] != type(optimizer).__name__:
            raise LocalError(f"the saved state is of {value['kind']}, the optimiser is {type(optimizer).__name__}")
        for index, (ours, saved) in enumerate(zip(shapes, value["parameters"], strict=True)):
            if ours != saved:
                raise LocalError(f"parameter {index} of the optimiser is {ours}, the saved state's is {saved}")
        state = {key: _unpack(value[key], tensors) for key in ("state", "param_groups")}
        optimizer.load_state_dict(state)
    except (KeyError, TypeError, ValueError) as error:
        raise LocalError(f"not the state of this optimiser: {error}") from None
    parameters = [part for group in optimizer.param_groups for part in group["params"]]
    for index, saved_state in state["state"].items():  # torch casts floats to the parameter's dtype: undo that
        ours = optimizer.state[parameters[index]]
        for key, part in saved_state.items():
            if isinstance(part, Tensor) and ours[key].dtype != part.dtype:
                ours[key] = part.to(ours[key].device)


def _pack(value: Any, name: str, tensors: dict[str, Tensor], depth: int) -> Any:
    """Plain data with every tensor moved into `tensors` under its path; tagged where JSON would lose a type."""
    if depth < 0:
        raise LocalError(f"optimiser state nests deeper than {NESTING_MAX}: {name}")
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name, "shape": list(value.shape)}
    if isinstance(value, dict):
        items = [[pack_plain(key), _pack(part, f"{name}.{key}", tensors, depth - 1)] for key, part in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [_pack(part, f"{name}.{index}", tensors, depth - 1) for index, part in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    return pack_plain(value)


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(part, tensors) for part in value]
    if isinstance(value, dict):
        if "tensor" in value:
            tensor = tensors[value["tensor"]]
            if list(tensor.shape) != value["shape"]:
                raise LocalError(f"saved tensor {value['tensor']!r} is {list(tensor.shape)}, expected {value['shape']}")
            return tensor.clone()
        if "dict" in value:
            return {unpack_plain(key): _unpack(part, tensors) for key, part in value["dict"]}
        if "tuple" in value:
            return tuple(_unpack(part, tensors) for part in value["tuple"])
    return unpack_plain(value)


def pack_plain(value: Any) -> Any:
    """JSON without floats. Raises LocalError for anything but None, booleans, numbers and text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    raise LocalError(f"optimiser state that is neither a tensor nor plain data: {type(value).__name__}")


def unpack_plain(value: Any) -> Any:
    """The inverse of `pack_plain`."""
    return float.fromhex(value["float"]) if isinstance(value, dict) else value
