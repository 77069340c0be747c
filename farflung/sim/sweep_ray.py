"""A sweep's runs on Ray: the cluster it finds, or one that it starts on this machine. Ray is not a dependency."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from farflung.protocol.errors import ConfigError, LocalError
from farflung.sim.sweep import ONE_THREAD, Group, Job, Stream, Work


def stream_ray(jobs: Sequence[Job], groups: Sequence[Group], work: Work) -> Stream:
    """Groups as they are done, one core each. Closing the stream cancels what still runs.

    farflung and the scenarios' trace files must be on every machine of the cluster, at the same paths. Raises
    ConfigError at the first step if Ray is not installed.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"Ray is not installed: `pip install ray`, or use the engine processes, got {error}"
        ) from None
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, include_dashboard=False)
    task = ray.remote(work).options(num_cpus=1, max_retries=0, runtime_env={"env_vars": dict.fromkeys(ONE_THREAD, "1")})
    running = {task.remote([jobs[place] for place in group.places]): group for group in groups}
    try:
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            group = running.pop(ready)
            try:
                parts = ray.get(ready)
            except ray.exceptions.RayError as error:
                parts = [LocalError(f"Ray lost it: {type(error).__name__}: {error}") for _ in group.places]
            yield group, parts
    finally:
        for ready in running:
            ray.cancel(ready, force=True)
        if own:
            ray.shutdown()
