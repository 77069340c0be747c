"""The local loop: one counted optimiser step at a time around any torch model, and what must be saved to go on.

`farflung join` drives a `Trainer` made from a task; a baseline without a swarm drives the same one. The learning rate
follows the certified global step, which the caller sets at every adoption. Randomness inside the model (dropout) comes
from this member's own stream; the process's global generators are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from farflung.node.data import Sharder, View
from farflung.node.optimizer_state import optimizer_tensors, pack_plain, restore_optimizer, unpack_plain
from farflung.node.tasks.task import Batch, Task, count_tokens
from farflung.protocol.errors import ConfigError, LocalError

REWARM_STEPS = 10
"""Over which a late joiner without inner moments raises its learning rate: Adam's second moment needs about 10."""

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainerSettings:
    """How a member trains; nothing here changes what the run agrees on."""

    device: str = "auto"
    """"auto" takes CUDA, then MPS, then the CPU; or a torch device such as "cuda:1"."""
    precision: str = "fp32"
    """Of the forward pass (autocast): "fp32", "bf16", or "fp16" with loss scaling. Parameters keep their dtype."""
    accumulate: int = 1
    """Batches per optimiser step; their losses are averaged. Only the optimiser step counts as a step."""
    clip_norm: float | None = None
    """Scale this member's gradient down to this norm; None: leave it. Costs one pass over the gradient."""
    threads: int | None = None
    """CPU threads of torch, for the whole process; None: leave them."""
    seed: int | None = None
    """Of the model's own randomness; give every member another. None: use the global generators."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.accumulate < 1 or (self.threads is not None and self.threads < 1):
            raise ConfigError(f"accumulate and threads must be at least 1, got {self.accumulate} and {self.threads}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be positive, got {self.clip_norm}")


class StepResult(NamedTuple):
    """One step. `loss` is a detached scalar on the device: `float()` of it waits for the device."""

    loss: Tensor
    tokens: int
    counted: bool
    """False if loss scaling skipped the update: the parameters did not move."""


def pick_device(name: str = "auto") -> torch.device:
    """The training device. Raises ConfigError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f'not a torch device (try "auto"): {name!r}') from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"torch sees {torch.cuda.device_count()} CUDA devices, got {name!r}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"torch has no MPS here, got {name!r}")
    return device


class Trainer:
    """Model, optimiser and data of one member. The model is on its device already (see `Trainer.of_task`).

    `loss(model, batch)` gives a scalar with a gradient; `lr_at(global_step)` the factor on the optimiser's own rates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[nn.Module, Batch], Tensor],
        batches: Iterator[Batch],
        *,
        settings: TrainerSettings | None = None,
        lr_at: Callable[[int], float] | None = None,
        tokens: Callable[[Batch], int] = count_tokens,
    ) -> None:
        self.settings = settings if settings is not None else TrainerSettings()
        self.model, self.optimizer = model, optimizer
        self.batches = batches
        self.global_step = 0
        """The certified global step of the next update. Counts on by itself; set it when an anchor is adopted."""
        self._loss, self._lr_at, self._tokens = loss, lr_at, tokens
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not self._parameters:
            raise ConfigError("the optimiser has no parameters")
        self.device = self._parameters[0].device
        self._dtype = PRECISIONS[self.settings.precision]
        half = self._dtype is torch.float16
        self._scaler = torch.amp.GradScaler(self.device.type) if half else None
        self._ramp_at, self._ramp_steps = 0, 0
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        self._random = _Randomness(self.settings.seed, self.device)
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    @staticmethod
    def of_task(task: Task, view: View, settings: TrainerSettings | None = None) -> Trainer:
        """A trainer whose model, optimiser, data and schedule are the task's. `view` decides this member's data."""
        settings = settings if settings is not None else TrainerSettings()
        model = task.build_model().to(pick_device(settings.device))
        return Trainer(
            model,
            task.build_optimizer(model),
            task.loss,
            iter(task.batches(Sharder(view))),
            settings=settings,
            lr_at=getattr(task, "lr_at", None),
            tokens=getattr(task, "tokens", count_tokens),
        )

    def train_step(self) -> StepResult:
        """Take `accumulate` batches and update once. Raises StopIteration when there are no more batches."""
        self._set_rates()
        with self._random.lent():
            total, tokens = self._accumulate_gradient()
            counted = self._update()
        self.optimizer.zero_grad(set_to_none=True)
        if counted:
            self.global_step += 1
            self._ramp_at += 1
        return StepResult(total, tokens, counted)

    def rewarm(self, steps: int) -> None:
        """Multiply the learning rate by 1/steps, 2/steps, ... 1 over the next counted steps: for fresh moments."""
        self._ramp_at, self._ramp_steps = 0, steps

    def start_fresh(self, *, rewarm_steps: int) -> None:
        """What a late joiner does: no inner moments, and a short re-warm-up."""
        self.optimizer.state.clear()
        self.rewarm(rewarm_steps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a bit-identical continuation needs besides parameters and data: (tensors, JSON).

        The tensors may be the live ones: write them out, or clone them, before the next step.
        """
        tensors, optimizer = optimizer_tensors(self.optimizer)
        for name, value in self._random.states().items():
            tensors[f"random.{name}"] = value
        scaler: dict[str, Any] = {}
        if self._scaler is not None:
            scaler = {key: pack_plain(value) for key, value in self._scaler.state_dict().items()}
        ramp = [self._ramp_at, self._ramp_steps]
        return tensors, {"global_step": self.global_step, "ramp": ramp, "optimizer": optimizer, "scaler": scaler}

    def restore(self, tensors: Mapping[str, Tensor], value: Mapping[str, Any]) -> None:
        """The inverse of `state`. Raises LocalError if it is not of such a trainer."""
        try:
            restore_optimizer(self.optimizer, tensors, value["optimizer"])
            self._random.restore(
                {name.removeprefix("random."): part for name, part in tensors.items() if name.startswith("random.")}
            )
            if self._scaler is not None and value["scaler"]:
                self._scaler.load_state_dict({key: unpack_plain(part) for key, part in value["scaler"].items()})
            self.global_step = int(value["global_step"])
            self._ramp_at, self._ramp_steps = (int(part) for part in value["ramp"])
        except (KeyError, TypeError, ValueError) as error:
            raise LocalError(f"not the state of a trainer: {error!r}") from None

    def _accumulate_gradient(self) -> tuple[Tensor, int]:
        total, tokens = torch.zeros((), device=self.device), 0
        for _ in range(self.settings.accumulate):
            batch = next(self.batches)
            tokens += self._tokens(batch)
            with self._autocast():
                loss = self._loss(self.model, _to_device(batch, self.device))
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ConfigError(f"loss(model, batch) must return a scalar tensor, got {type(loss).__name__}")
            share = loss / self.settings.accumulate if self.settings.accumulate > 1 else loss
            (share if self._scaler is None else self._scaler.scale(share)).backward()  # type: ignore[no-untyped-call]
            total += share.detach().view(())
        return total, tokens

    def _update(self) -> bool:
        scaler, clip_norm = self._scaler, self.settings.clip_norm
        if clip_norm is not None:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters, clip_norm)
        if scaler is None:
            self.optimizer.step()
            return True
        before = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        return scaler.get_scale() >= before  # the scale falls exactly when an update was skipped

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, dtype=self._dtype)

    def _set_rates(self) -> None:
        if self._lr_at is None and not self._ramp_steps:
            return
        factor = 1.0 if self._lr_at is None else self._lr_at(self.global_step)
        if self._ramp_at < self._ramp_steps:
            factor *= (self._ramp_at + 1) / self._ramp_steps
        if self._ramp_at >= self._ramp_steps:
            self._ramp_steps = 0
        for group in self.optimizer.param_groups:
            rate = group["initial_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


class _Randomness:
    """This member's stream for torch's generators, lent to one step at a time."""

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._device, self._states = device, {}  # type: torch.device, dict[str, Tensor]
        if seed is not None:
            before = self._read()
            torch.manual_seed(seed)
            self._states = self._read()
            self._write(before)

    @contextmanager
    def lent(self) -> Iterator[None]:
        if not self._states:
            yield
            return
        before = self._read()
        self._write(self._states)
        try:
            yield
        finally:
            self._states = self._read()
            self._write(before)

    def states(self) -> dict[str, Tensor]:
        return dict(self._states)

    def restore(self, states: dict[str, Tensor]) -> None:
        """A state saved on another kind of device is dropped for that device: its stream starts anew."""
        self._states.update({name: value for name, value in states.items() if name in self._states})

    def _read(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        elif self._device.type == "mps":
            states["mps"] = torch.mps.get_rng_state()
        return states

    def _write(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self._device)
        elif "mps" in states:
            torch.mps.set_rng_state(states["mps"])


def _to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`. Tuples keep their type; other objects are left alone."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to_device(part, device) for key, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to_device(part, device) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to_device(part, device) for part in batch)
    return batch
