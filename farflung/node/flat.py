"""A model and one fp32 vector: which tensors are exchanged, in which order, and how they are copied in and out.

Canonical order is by parameter name. A tied weight appears once, under the first of its names in that order. Only
tensors that require a gradient are exchanged, so a frozen base costs nothing. Names are those of the bare model:
wrappers (`torch.compile`, DDP, activation checkpointing) leave no trace, so members may wrap as they like.

Buffers are local. Integer buffers (counters) always; float buffers (batch-norm statistics) too: every member keeps
its own, and none is in the schema. A later option will name the float buffers to be averaged.

Vectors are fp32 on the CPU; parameters may have any float dtype, device and layout. Writing never replaces a
parameter's storage, so optimisers, hooks and captured graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from farflung.aggregation.outer import Norm
from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.schema import Schema, TensorSpec

if TYPE_CHECKING:
    from jaxtyping import Float

WINDOW = 1 << 22
"""Elements copied at a time where a scratch buffer is needed: 16 MB of fp32, small beside any model that needs it."""

CACHED = 1 << 16
"""Elements per step where a vector in memory is used twice: the second time it is in the cache."""

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch's wrappers insert into parameter names."""

MASTER_KEYS = ("master", "fp32")
"""How optimisers call a second copy of the parameters (apex, Transformer Engine, DeepSpeed, torchao)."""


class Trainable(NamedTuple):
    """One exchanged tensor, its canonical name, and its half-open range in the flat vector."""

    name: str
    tensor: Tensor
    start: int
    stop: int


def trainable(model: nn.Module) -> list[Trainable]:
    """The exchanged tensors in canonical order, detached but sharing storage with the model.

    Raises ConfigError for a tensor that cannot be exchanged: sharded, empty, or not a real float tensor.
    """
    seen: set[object] = set()
    found: list[Trainable] = []
    position = 0
    for name, parameter in sorted(_bare_names(model)):
        tensor = parameter.detach()
        keys = {id(parameter), _memory(tensor)}
        if not parameter.requires_grad or seen & keys:
            continue
        seen |= keys
        _check_exchangeable(name, parameter)
        found.append(Trainable(name, tensor, position, position + tensor.numel()))
        position += tensor.numel()
    return found


def schema_of(model: nn.Module) -> Schema:
    """Names, shapes and dtypes of what is exchanged. Works on the meta device. Raises ConfigError."""
    return Schema(
        tuple(
            TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor, _, _ in trainable(model)
        )
    )


def read_parameters(model: nn.Module, out_d: Float[Tensor, " d"]) -> None:
    """out ← φ, in fp32. Exact for bf16, fp16 and fp32 models."""
    parts = _parts(model, out_d)
    for part in parts:
        out_d[part.start : part.stop].view(part.tensor.shape).copy_(part.tensor, non_blocking=True)
    _wait(parts)


def write_parameters(model: nn.Module, values_d: Float[Tensor, " d"]) -> None:
    """φ ← values, rounded to each parameter's dtype, into the storage it already has."""
    parts = _parts(model, values_d)
    for part in parts:
        part.tensor.copy_(values_d[part.start : part.stop].view(part.tensor.shape), non_blocking=True)
    _wait(parts)


def difference_into(out_d: Float[Tensor, " d"], start_d: Float[Tensor, " d"], model: nn.Module) -> None:
    """Δ: out ← start − φ in fp32. `out_d` may be `start_d`. Makes no temporaries on the CPU."""
    if out_d.data_ptr() == start_d.data_ptr():
        for flat, start, stop in _windows(_parts(model, out_d)):
            start_d[start:stop].view(flat.shape).sub_(flat if _is_plain(flat) else _as_fp32(flat))
        return
    parts = _parts(model, out_d)
    for _, tensor, start, stop in parts:
        shape = tensor.shape
        difference, before = out_d[start:stop].view(shape), start_d[start:stop].view(shape)
        if _is_plain(tensor):
            torch.sub(before, tensor, out=difference)
        else:
            difference.copy_(tensor)
            torch.sub(before, difference, out=difference)


def difference_and_norm(start_d: Float[Tensor, " d"], model: nn.Module) -> float:
    """Δ = start − φ in the place of start, as `difference_into`; returns its norm (`outer.norm`, bit for bit)."""
    norm = Norm(start_d)
    for flat, start, stop in _windows(_parts(model, start_d), CACHED):
        start_d[start:stop].view(flat.shape).sub_(flat if _is_plain(flat) else _as_fp32(flat))
        norm.reached(stop)
    return norm.end()


def shift_parameters(
    model: nn.Module, new_d: Float[Tensor, " d"], old_d: Float[Tensor, " d"], ahead_d: Float[Tensor, " d"] | None = None
) -> None:
    """φ ← (φ − old) + new − ahead: move to another start and keep the local progress made since the old one.

    Computed in fp32 and rounded once to each parameter's dtype. Scratch memory: one window, if not fp32 on the CPU.
    """
    for flat, start, stop in _windows(_parts(model, new_d)):
        moved = flat if _is_plain(flat) else _as_fp32(flat)
        moved.sub_(old_d[start:stop].view(flat.shape)).add_(new_d[start:stop].view(flat.shape))
        if ahead_d is not None:
            moved.sub_(ahead_d[start:stop].view(flat.shape))
        if moved is not flat:
            flat.copy_(moved)


def adopt(
    model: nn.Module, theta_d: Float[Tensor, " d"], start_d: Float[Tensor, " d"] | None = None
) -> Float[Tensor, " d"]:
    """φ ← θ; returns φ_start, what the model really holds now, for the next `difference_into`.

    A pure fp32 model holds θ itself, and `theta_d` is returned: `start_d` may be None. Otherwise rounding changed
    it: `start_d` is filled and returned, so that Δ never contains the rounding. Raises LocalError if it is missing.
    """
    write_parameters(model, theta_d)
    if holds_fp32(model):
        return theta_d
    if start_d is None:
        raise LocalError("a model that is not pure fp32 needs a start vector to record what it holds after adoption")
    read_parameters(model, start_d)
    return start_d


def adopt_copy(model: nn.Module, theta_d: Float[Tensor, " d"], start_d: Float[Tensor, " d"]) -> None:
    """φ ← θ, start ← φ_start, what the model really holds now; θ is read once if the model is fp32 on the CPU."""
    parts = _parts(model, theta_d)
    if not all(_is_plain(part.tensor) for part in parts):
        start_d.copy_(theta_d)
        adopt(model, start_d, start_d)
        return
    for flat, start, stop in _windows(parts, CACHED):
        theta_w = theta_d[start:stop].view(flat.shape)
        flat.copy_(theta_w)
        start_d[start:stop].view(flat.shape).copy_(theta_w)


def holds_fp32(model: nn.Module) -> bool:
    """Whether the model can hold every fp32 anchor without rounding."""
    return all(part.tensor.dtype in (torch.float32, torch.float64) for part in trainable(model))


def refuse_master_copies(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> None:
    """Raise ConfigError if the optimiser keeps its own fp32 copies of low-precision parameters.

    Such a copy would overwrite an adopted anchor at the next step. It is recognised by its name, by holding the
    parameter's own values, or (with `model`) because the optimiser's tensors are not the model's. Call it after
    construction and again after the first step: most copies are made only then.
    """
    advice = "train in fp32 or with autocast instead, or switch the master copies off"
    for attribute, value in vars(optimizer).items():
        if any(key in attribute.lower() for key in MASTER_KEYS) and _has_tensors(value):
            raise ConfigError(f"the optimiser keeps master copies ({advice}): {attribute!r}")
    ours = None if model is None else {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if ours is not None and id(parameter) not in ours:
                raise ConfigError(
                    f"the optimiser trains a tensor that is not the model's ({advice}): {tuple(parameter.shape)}"
                )
            key = _master_key(parameter, optimizer.state.get(parameter, {}))
            if key is not None:
                raise ConfigError(f"the optimiser keeps an fp32 master copy ({advice}): state {key!r}")


def _master_key(parameter: Tensor, state: dict[str, Any]) -> str | None:
    """The name of the state tensor that is a second copy of `parameter`, if there is one."""
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return None
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.shape != parameter.shape:
            continue
        if any(word in str(key).lower() for word in MASTER_KEYS):
            return str(key)
        if parameter.numel() > 1 and bool(parameter.any()) and torch.equal(value.to(parameter), parameter.detach()):
            return str(key)
    return None


def _has_tensors(value: object) -> bool:
    """Whether a container, nested at most three deep as in lists of groups, holds a tensor."""
    layer = [value]
    for _ in range(4):
        if any(isinstance(item, Tensor) for item in layer):
            return True
        inner: list[object] = []
        for item in layer:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, (list, tuple)):
                inner.extend(item)
        layer = inner
    return False


def _bare_names(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")  # noqa: PLW2901  # each wrapper leaves the name of the bare model
        yield name, parameter


def _memory(tensor: Tensor) -> object:
    """Equal for two tensors that are the same memory seen the same way (`Parameter(other.data)`)."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return object()
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _check_exchangeable(name: str, parameter: Tensor) -> None:
    if type(parameter).__name__ == "DTensor" or hasattr(parameter, "_local_tensor"):
        raise ConfigError(f"sharded parameters cannot be exchanged; one speaker must hold the whole model: {name!r}")
    if not parameter.is_floating_point():
        raise ConfigError(f"only real float tensors can be exchanged; freeze this one: {name!r} is {parameter.dtype}")
    if not parameter.numel():
        raise ConfigError(f"an empty tensor cannot be exchanged; freeze it: {name!r} {tuple(parameter.shape)}")


def _parts(model: nn.Module, vector_d: Tensor) -> list[Trainable]:
    parts = trainable(model)
    length = parts[-1].stop if parts else 0
    if vector_d.dtype != torch.float32 or vector_d.shape != (length,) or not vector_d.is_contiguous():
        raise LocalError(
            f"expected a contiguous fp32 vector of length {length}, got {vector_d.dtype} {tuple(vector_d.shape)}"
        )
    return parts


def _windows(parts: list[Trainable], plain: int = WINDOW) -> Iterator[tuple[Tensor, int, int]]:
    """Views of the parameters, with their range: at most `plain` elements of what is fp32 on the CPU, at most WINDOW of
    the rest; non-contiguous tensors come whole."""
    for _, tensor, start, stop in parts:
        if not tensor.is_contiguous():
            yield tensor, start, stop
            continue
        flat, window = tensor.view(-1), plain if _is_plain(tensor) else WINDOW
        for low in range(start, stop, window):
            high = min(low + window, stop)
            yield flat[low - start : high - start], low, high


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _as_fp32(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float32)


def _wait(parts: list[Trainable]) -> None:
    """Copies to and from pinned memory are asynchronous: wait for the devices that took part."""
    for device in {part.tensor.device for part in parts if part.tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
