"""Exploration: worlds of real nodes in which random things go wrong, judged by invariants, shrunk to one line.

actions.py, schedule.py   what may go wrong, as values and as text; draw.py: from a seed
stage.py, faults.py       the watched world, and carrying a schedule out in it
ground.py                 the run and the machines, the same in every world
facts.py, invariants.py   what was seen, and what must be true of it; crowds.py, patience.py: the bounds
mixing_watch.py, mixing_facts.py, mixing_laws.py   the same for runs whose members mix
drill.py, shrink.py       one schedule and its verdict; a smaller one that breaks the same
search.py                 many seeds on all cores: `explore` and `replay`
"""

from farflung.sim.explore.search import Exploration, Violation, explore, replay

__all__ = ["Exploration", "Violation", "explore", "replay"]
