"""What the tests of the reuse cache share."""

import pytest

from octavo.reuse.costs import Costs


@pytest.fixture(autouse=True)
def every_tier_is_fast(monkeypatch):
    """Tiny prompts are computed in microseconds, so on a busy machine the disk would be passed over now and then."""
    monkeypatch.setattr(Costs, "worth_loading", lambda *args: True)
