"""What members really send: real nodes in the simulator's world, a few rounds, every message counted at its sender."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from farflung.node.anchor import Trial, genesis_buffers
from farflung.node.run_file import RunFile, make_genesis
from farflung.node.tasks.load import load_task
from farflung.protocol.certificate import Certificate
from farflung.protocol.errors import LocalError
from farflung.protocol.identity import Identity
from farflung.sim.bench.wire_count import Way
from farflung.sim.life import SECRET, Life, memory_disk
from farflung.sim.network.topology import Topology
from farflung.sim.population import populate
from farflung.sim.draw import Draw
from farflung.sim.rng import seeded
from farflung.sim.scenario import Members, Model, Network, Scenario
from farflung.sim.world import Genesis0, World
