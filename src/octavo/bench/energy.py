"""Energy that a GPU has used, as its driver counts it (NVML)."""

import importlib
from functools import cache
from typing import Any

import torch

SHORTEST = 1.0  # seconds: the driver's counter moves some ten times a second, so less says nothing


def joules(device: torch.device) -> float | None:
    """Joules since the driver was loaded; None on a CPU, without `pynvml`, or where the driver does not count them."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    nvml, handle = _counter(torch.cuda.current_device() if device.index is None else device.index)
    if handle is None:
        return None
    try:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except nvml.NVMLError:
        return None


def per_token(before: float | None, after: float | None, seconds: float, tokens: int) -> float | None:
    """Joules for each of `tokens`; None where they were not counted, or for less than `SHORTEST`."""
    return None if before is None or after is None or seconds < SHORTEST else (after - before) / tokens


@cache
def _counter(index: int) -> tuple[Any, Any]:
    """(NVML, its name of torch's device, which may be numbered otherwise); None where NVML cannot be asked."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    except (nvml.NVMLError, AttributeError):
        return nvml, None
