"""Same seed and same event tape give the same bytes: masses, graphs, ledgers, copies (I-21)."""

import json
import os
import subprocess
import sys
from pathlib import Path

from same_bytes_story import threaded, told

STORY = Path(__file__).parent / "same_bytes_story.py"


def elsewhere(threads, hash_seed):
    """The tape in a fresh interpreter that hashes strings in its own way."""
    return subprocess.Popen(
        [sys.executable, str(STORY), str(threads)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
    )


def test_one_to_four_threads_leave_the_same_bytes():
    one = threaded(1)
    assert len({*one.values()}) == len(one) == 4
    assert [threaded(threads) for threads in (2, 3, 4)] == [one] * 3


def test_interpreters_that_hash_differently_leave_the_same_bytes():
    with elsewhere(1, "1") as first, elsewhere(4, "77") as second:
        here = told(2)
        answers = [process.communicate(timeout=170)[0] for process in (first, second)]
    assert len({*here.values()}) == len(here) == 6
    assert [json.loads(answer) for answer in answers] == [here, here]
