"""Fixtures that several rooms' tests share."""

import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in Triton's interpreter; read when triton is first imported

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell runs in the background; some tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="repeat what is random as often as the stated counts say")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether random tests run in full."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    """Free the attached models of a module: each reserves as many addresses as there is memory, and a model and what is
    attached to it refer to each other. With hundreds of such reservations a process cannot fork any more."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models wait for their threads most of the time where anything else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm() -> Any:
    """(model, tokenizer): the embedded default in float32, unattached."""
    from octavo.models import load_plain

    return load_plain(dtype=torch.float32, device="cpu")
