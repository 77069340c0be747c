"""Timing-only fidelity: how long rounds take, for any model size, without training.

`run_timing` is the door. `rounds` and `votes` play one round by the real node's rules on what lasts (`swarm`, made of
`presence`, `lines` and `charges`), and `settle` carries that on; `exchange` is the gather as a fluid, `collectives` are
the classical ones; `trace` is a round as it went, `blame` and `gantt` are read off it.
"""

from farflung.sim.timing.run import run_timing

__all__ = ["run_timing"]
