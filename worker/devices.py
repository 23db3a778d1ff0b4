"""The device a job runs on, and what the job's answer says of it."""

import functools
import importlib.metadata
import platform
from typing import Any

import torch

from service.errors import DeviceUnavailable

LIBRARIES = ("numpy", "rankscope", "scikit-learn", "scipy", "torch")


def choose_device(wanted: str, offered: list[str]) -> str:
    """The device to run on. Raises DeviceUnavailable where the one asked for is not there after all."""
    if wanted in {"auto", "cuda"}:
        wanted = next((name for name in offered if name.startswith("cuda")), "cpu" if wanted == "auto" else wanted)
    if wanted != "cpu" and (torch.device(wanted).index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(f"the deployment offers {wanted}, but this worker finds no such device")
    return wanted


def found_devices() -> list[str]:
    """The devices of this machine that torch can use."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the libraries that the numbers come from, and of Python."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def environment(device: str) -> dict[str, Any]:
    """The device and the versions of what the numbers come from."""
    return {"device": device, "versions": versions()}
