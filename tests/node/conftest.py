import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def quick_peers(monkeypatch):
    """Threads on one machine need not wait seconds before they look for each other again."""
    from farflung.node import peers, state_sync

    monkeypatch.setattr(peers, "LOOK_S", 0.05)
    monkeypatch.setattr(state_sync, "RETRY_S", 0.05)
