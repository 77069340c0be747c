"""What a run trains: a task is a Python object that builds a model and an optimiser and yields batches and losses.

A task is named in the run file as `module:object`, or is built in: `builtin:stdlib-gpt`, `builtin:linear`,
`builtin:stub`. Its name and options are part of the genesis, its code is not: nothing from a peer is executed.
"""

from farflung.node.tasks.load import BUILTIN, describe_task, load_described, load_task
from farflung.node.tasks.task import Batch, Task, bits_per_byte, count_tokens

__all__ = [
    "BUILTIN",
    "Batch",
    "Task",
    "bits_per_byte",
    "count_tokens",
    "describe_task",
    "load_described",
    "load_task",
]
