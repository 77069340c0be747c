"""farflung: train one model on machines that are far apart and thinly connected.

swarm = farflung.join(invite, model, optimizer)      # any torch model and optimiser
for batch in swarm.shard(dataset, batch=16):
    loss = model(batch)
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    swarm.step(tokens=batch.numel(), loss=loss)
swarm.leave()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from farflung.node.join import join
    from farflung.node.swarm import Swarm
    from farflung.sim.simulate import simulate

__all__ = ["Swarm", "__version__", "join", "simulate"]


def __getattr__(name: str) -> Any:
    """Heavy parts are imported when they are first used."""
    if name == "join":
        from farflung.node.join import join

        return join
    if name == "Swarm":
        from farflung.node.swarm import Swarm

        return Swarm
    if name == "simulate":
        from farflung.sim.simulate import simulate

        return simulate
    raise AttributeError(f"module 'farflung' has no attribute {name!r}")
