"""Energy that a GPU has used, as its driver counts it (NVML)."""

from functools import cache
from typing import Any

import torch

SHORTEST = 1.0  # seconds: the driver's counter moves some ten times a second, so less says nothing


def joules(device: torch.device) -> float | None:
    """Joules since the driver was loaded; None on a CPU, without `pynvml`, or where the driver does not count them."""
    handle = _handle(torch.cuda.current_device() if device.index is None else device.index) if _counts(device) else None
    if handle is None:
        return None
    import pynvml

    try:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except pynvml.NVMLError:
        return None


def per_token(before: float | None, after: float | None, seconds: float, tokens: int) -> float | None:
    """Joules for each of `tokens`; None where they were not counted, or for less than `SHORTEST`."""
    return None if before is None or after is None or seconds < SHORTEST else (after - before) / tokens


def _counts(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None


@cache
def _handle(index: int) -> Any:
    """NVML's name of torch's device, which may be numbered otherwise; None where NVML cannot be asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(index).uuid
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (ImportError, AttributeError):
        return None
    except Exception as error:  # pynvml's own, whose class is not there where the import fails
        if type(error).__module__.startswith("pynvml"):
            return None
        raise
