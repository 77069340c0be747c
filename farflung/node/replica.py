"""A member's own parameters and outer state, where members mix and therefore differ (push-sum and pairs modes).

Three vectors of length d for Nesterov, two for sgd: θ_i, what the outer optimiser keeps, and φ, what the local phase
came to. They belong to this member alone: nobody certifies them, and they are saved with its other own state.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from farflung.aggregation.outer import OuterOptimizer, State
from farflung.protocol.errors import LocalError

THETA = "theta"
"""The name of the parameters among what is saved."""


class Replica:
    """`theta_d` is read under `lock` by the training thread; everything else by one thread at a time."""

    def __init__(self, outer: OuterOptimizer, d: int) -> None:
        self.outer = outer
        self.theta_d = torch.zeros(d)
        self.state: State = tuple(torch.zeros(d) for _ in outer.state_names)
        self.phi_d = torch.zeros(d)
        """The parameters after the local phase that was announced last."""
        self.phi_round = 0
        """The round of that local phase; 0: none in this process. φ is not kept over restarts."""
        self.lock = threading.Lock()
        self.round_index = 0
        """The round after which training stands on these parameters."""
        self.trained = 0
        """Trained rounds that are in them."""

    def start_from(self, theta_d: Tensor, state: State, *, round_index: int, trained: int) -> None:
        """Take a reference: a joiner's first parameters."""
        with self.lock:
            self.theta_d.copy_(theta_d)
            for mine_d, part_d in zip(self.state, state, strict=True):
                mine_d.copy_(part_d)
            self.round_index, self.trained = round_index, trained

    def note_end(self, delta_d: Tensor) -> None:
        """The local phase came to φ = θ_i − Δ."""
        torch.sub(self.theta_d, delta_d, out=self.phi_d)

    def step(self, gradient_d: Tensor, *, round_index: int, trained: int, threads: int = 1) -> None:
        """One outer step along the pseudo-gradient of a mixing."""
        with self.lock:
            self.outer.step(
                self.theta_d,
                self.state,
                gradient_d,
                theta_out_d=self.theta_d,
                state_out=self.state,
                trained=trained,
                threads=threads,
            )
            self.round_index, self.trained = round_index, trained

    def catch_up(self, gradient_d: Tensor, *, round_index: int, trained: int) -> None:
        """Go to where the others are, at once: several rounds' movement is no pseudo-gradient of one."""
        with self.lock:
            self.theta_d.sub_(gradient_d)
            self.round_index, self.trained = round_index, trained

    def stay(self, round_index: int) -> None:
        """A round has ended in which nothing was mixed here."""
        self.round_index = round_index

    # -- over restarts ------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What to save, together with `meta`; views, to be read under the lock."""
        return {THETA: self.theta_d, **dict(zip(self.outer.state_names, self.state, strict=True))}

    def meta(self) -> dict[str, Any]:
        """See `tensors`."""
        return {"outer": self.outer.spec, "round": self.round_index, "trained": self.trained}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """The inverse. Raises LocalError if it is of another model or optimiser."""
        mine = self.tensors()
        fits = meta.get("outer") == self.outer.spec and tensors.keys() == mine.keys()
        if not fits or any(tensors[name].shape != mine[name].shape for name in mine):
            raise LocalError("saved parameters of another model or outer optimiser")
        with self.lock:
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])
            self.round_index, self.trained = int(meta["round"]), int(meta["trained"])
