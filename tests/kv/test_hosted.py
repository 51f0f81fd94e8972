"""Copies on the host, as far as they need no GPU; tests/test_cuda.py has the rest."""

import gc
import os

import pytest
import torch

from octavo.kv import hosted
from octavo.kv.hosted import Mapping
from octavo.kv.restoring import stretch
from octavo.kv.snapshot import Ragged

GPU = torch.device("cuda")


class Cuda:
    """Takes note of what CUDA would be told of; `refused`: it does not want to know."""

    class cudaError:
        success = 0

    def __init__(self, refused: bool = False) -> None:
        self.refused, self.known, self.told = refused, {}, []

    def cudaHostRegister(self, address, nbytes, flags):
        self.told.append(("register", address))
        if self.refused:
            return 1
        self.known[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        self.told.append(("unregister", address))
        del self.known[address]
        return 0


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    return made


def part(n: int) -> Ragged:
    return Ragged(
        torch.tensor([[n, 0]], dtype=torch.int32), torch.arange(n, dtype=torch.int32), torch.randn(n, 8).bfloat16(),
        torch.randn(n, 8).bfloat16(), expiry=torch.arange(n, dtype=torch.int32),
    )  # fmt: skip


@pytest.mark.parametrize("n", [0, 1, 7, 3000])
def test_room_has_the_shapes_of_what_it_is_for_and_keeps_what_is_written(cuda, n):
    given = part(n).tensors
    room = hosted._room(given, GPU)
    for name, tensor in given.items():
        assert room[name].shape == tensor.shape
        assert room[name].dtype == tensor.dtype
        assert room[name].data_ptr() % 64 == 0 or not n
        room[name].copy_(tensor)
    for name, tensor in given.items():
        assert torch.equal(room[name], tensor), "tensors of one mapping lie apart"


def test_cuda_is_told_of_memory_until_the_last_tensor_is_gone(cuda):
    room = hosted._room(part(3000).tensors, GPU)
    ((address, nbytes),) = cuda.known.items()
    assert address <= min(t.data_ptr() for t in room.values())
    assert max(t.data_ptr() + t.nbytes for t in room.values()) <= address + nbytes
    last = room["value"][5:]
    del room
    gc.collect()
    assert cuda.known, "a view needs it still"
    del last
    gc.collect()
    assert cuda.told == [("register", address), ("unregister", address)]


def test_memory_that_cuda_refuses_is_memory(monkeypatch):
    refusing = Cuda(refused=True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    taken = []
    monkeypatch.setattr(hosted, "take_error", taken.append)
    room = hosted._room(part(100).tensors, GPU)
    room["key"].fill_(2)
    assert room["key"].sum() == 2 * room["key"].numel()
    del room
    gc.collect()
    assert len(refusing.told) == 1
    assert taken == [GPU], "or the next kernel would raise it"


def test_memory_that_cuda_does_not_let_go_of_stays(cuda, monkeypatch):
    room = hosted._room(part(3000).tensors, GPU)
    ((address, _),) = cuda.known.items()
    monkeypatch.setattr(cuda, "cudaHostUnregister", lambda address: 1)
    del room
    gc.collect()
    (stays,) = hosted._known
    assert stays.address == address, "or the next mapping would come to lie where CUDA knows another"
    hosted._known.clear()


class Interrupted(Cuda):
    """A signal arrives while CUDA registers memory: Python raises it once the call is back."""

    def cudaHostRegister(self, address, nbytes, flags):
        super().cudaHostRegister(address, nbytes, flags)
        raise KeyboardInterrupt


def test_an_interrupt_while_cuda_registers_leaves_nothing_known(monkeypatch):
    made = Interrupted()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    with pytest.raises(KeyboardInterrupt):
        hosted._room(part(3000).tensors, GPU)
    gc.collect()
    assert made.told[-1][0] == "unregister"
    assert not made.known
    assert not hosted._known


def test_a_child_process_leaves_its_parents_cuda_alone(cuda):
    view = Mapping.of(4096).pinned(GPU)
    if (child := os.fork()) == 0:
        try:
            del view
            gc.collect()
        finally:
            os._exit(len(cuda.told) - 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del view
    gc.collect()
    assert [what for what, _ in cuda.told] == ["register", "unregister"]


def test_what_lies_on_the_host_is_not_copied():
    given = part(5)
    assert all(a is b for a, b in zip(hosted.host(given).tensors.values(), given.tensors.values(), strict=True))


@pytest.mark.parametrize(("first", "last", "whole"), [(0, 40, True), (0, 30, True), (3, 9, False), (7, 7, False)])
@pytest.mark.parametrize("window", [None, 5])
def test_what_is_sent_whole_and_cut_there_is_what_is_cut_here(first, last, whole, window, monkeypatch):
    n = 40
    counts = torch.tensor([[n, 3, 0, n]], dtype=torch.int32)
    position = torch.cat([torch.arange(n), torch.tensor([1, 8, 39]), torch.arange(n)]).int()
    key = torch.randn(len(position), 4)
    given = stretch(Ragged(counts, position, key, 2 * key), first, last, window)
    here, sent = given.alone().tensors, []

    def to(tensor, device):
        sent.append(tensor)
        return tensor.clone()

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", to)
        there = given.on(torch.device("cuda")).tensors
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert bool(((here["position"] >= first) & (here["position"] < last)).all())
    assert int(here["counts"].sum()) == len(here["key"])
    assert any(t is key for t in sent) == whole, "few of many are cut here"
    if whole and len(here["key"]) < len(key):
        assert any(t is given.first for t in sent), "where they begin is needed there too"
