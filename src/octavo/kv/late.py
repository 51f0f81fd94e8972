"""Numbers that the host learns from the device without waiting for it, a step or more late."""

from collections import deque
from typing import Any

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: then nothing may be asked of the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Late:
    """Readings of device scalars, each with what the host wants to remember of the moment it was taken."""

    def __init__(self, device: torch.device) -> None:
        self._asynchronous = device.type == "cuda"
        self._device = device
        self._waiting: deque[tuple[Any, Tensor, Any]] = deque()  # (event, where the value arrives, what to remember)

    def post(self, value: Tensor, note: Any) -> None:
        """Begin to read `value`, one integer on the device."""
        if capturing(self._device):
            return
        if not self._asynchronous:
            self._waiting.append((None, value.clone(), note))
            return
        arrived = torch.empty((), dtype=value.dtype, pin_memory=True)
        arrived.copy_(value, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._waiting.append((event, arrived, note))

    def poll(self) -> list[tuple[int, Any]]:
        """The readings that have arrived since the last call, oldest first, each with its note."""
        arrived = []
        while self._waiting and (self._waiting[0][0] is None or self._waiting[0][0].query()):
            _, value, note = self._waiting.popleft()
            arrived.append((int(value), note))
        return arrived

    def forget(self) -> None:
        """Drop readings that mean nothing any more."""
        self._waiting.clear()
