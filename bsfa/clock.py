"""Clocks: CUDA events where the work is on a GPU, the wall clock where it is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


class Clock(Protocol):
    """Times spans of work. ``name`` goes into every record beside the seconds."""

    name: str

    def span(self, device: torch.device | None = None): ...


class WallClock:
    """`time.perf_counter`: right for work that is done when the call returns."""

    name = "cpu perf_counter"

    @contextmanager
    def span(self, device: torch.device | None = None) -> Iterator[Callable[[], float]]:
        """Yields a function that gives the span's seconds once the block is left."""
        ends: list[float] = []
        start = time.perf_counter()
        yield lambda: ends[0] - start
        ends.append(time.perf_counter())


class CudaClock:
    """CUDA events on a device's current stream. Nothing waits until the seconds are asked for."""

    name = "cuda events"

    @contextmanager
    def span(self, device: torch.device | None = None) -> Iterator[Callable[[], float]]:
        """Yields a function that waits for the span's end and gives its seconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def seconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        stream = torch.cuda.current_stream(device)
        start.record(stream)
        yield seconds
        end.record(stream)


def clock_for(device: torch.device) -> Clock:
    """The clock that times work on a device."""
    return CudaClock() if device.type == "cuda" else WallClock()
