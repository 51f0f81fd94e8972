"""Fixtures that several rooms' tests share."""

from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def smollm() -> Any:
    """(model, tokenizer): the embedded default in float32, unattached."""
    from octavo.models import load_plain

    return load_plain(dtype=torch.float32, device="cpu")
