"""A GPU's clocks, power, temperature and throttling, by the driver's management library (nvidia-ml-py).

Optional: without the library or without permission a field is None, and the report says that it was not sampled.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["facts", "sample"]

#: Bits of the reasons for lowered clocks that spoil a measurement; "idle" and "application clocks" do not.
_THROTTLE = {
    0x0000000000000004: "power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "thermal (software)",
    0x0000000000000040: "thermal (hardware)",
    0x0000000000000080: "power brake",
}


@functools.cache
def _handle(index: int) -> tuple[Any, Any] | None:
    """(pynvml, device handle), or None. The device is found by its UUID: CUDA_VISIBLE_DEVICES renumbers."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}" if not uuid.startswith("GPU-") else uuid)
    except pynvml.NVMLError:
        return None


def _ask(nvml: Any, call: Callable[[], Any]) -> Any:
    with contextlib.suppress(nvml.NVMLError):
        return call()
    return None


def facts(index: int) -> dict[str, Any]:
    """Driver, power limit (W), top clocks (MHz), ECC and MIG of a GPU; None for what cannot be asked."""
    names = ("driver", "power_limit_w", "sm_clock_max_mhz", "memory_clock_max_mhz", "ecc", "mig")
    found = _handle(index)
    if found is None:
        return dict.fromkeys(names)
    nvml, gpu = found
    limit = _ask(nvml, lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu))
    ecc = _ask(nvml, lambda: nvml.nvmlDeviceGetEccMode(gpu)[0])
    mig = _ask(nvml, lambda: nvml.nvmlDeviceGetMigMode(gpu)[0])
    driver = _ask(nvml, nvml.nvmlSystemGetDriverVersion)
    return {
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "power_limit_w": None if limit is None else limit / 1000,
        "sm_clock_max_mhz": _ask(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM)),
        "memory_clock_max_mhz": _ask(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
        "ecc": None if ecc is None else bool(ecc),
        "mig": None if mig is None else bool(mig),
    }


def sample(index: int) -> dict[str, Any]:
    """Clocks (MHz), power (W), temperature (C) and reasons for throttling now; without what is not known."""
    found = _handle(index)
    if found is None:
        return {}
    nvml, gpu = found
    power = _ask(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(gpu))
    reasons = _ask(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))
    values = {
        "sm_clock_mhz": _ask(nvml, lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
        "memory_clock_mhz": _ask(nvml, lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
        "power_w": None if power is None else power / 1000,
        "temperature_c": _ask(nvml, lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
        "throttle": None if reasons is None else [name for bit, name in _THROTTLE.items() if reasons & bit],
    }
    return {name: value for name, value in values.items() if value is not None}
