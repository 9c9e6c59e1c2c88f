"""Prompts read by one method after another, in turns: what each takes of time and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

import bsfa
from bsfa.attention import Backend, pick_backend
from bsfa.clock import clock_for
from bsfa.methods import Method
from experiments import environment
from experiments.models import Loaded
from experiments.prefill import Prefill
from experiments.statistics import quartiles
from experiments.sweep import new_process
from experiments.unavailable import reason

T = TypeVar("T")


@dataclass(frozen=True)
class Contender:
    """One row of the table: a method, or how to set one on a prompt, which is given as what reads it."""

    label: str
    make: Callable[[Callable[[], Any]], Method]

    @classmethod
    def of(cls, label: str, method: Method) -> Contender:
        """A method that is the same on every prompt."""
        return cls(label, lambda read: method)


@dataclass(frozen=True)
class Reading:
    """Prompts read once: seconds, and bytes in memory at the most."""

    ttft: float
    attention: float
    skip_ratio: float
    peak_memory: int


@dataclass(frozen=True)
class OutOfMemory:
    """What the allocator said."""

    said: str


class Turns:
    """Of contenders, on a loaded model and by its device's clock."""

    def __init__(self, loaded: Loaded, device: torch.device, backend: Backend, prefill: Prefill, repeats: int) -> None:
        self.loaded, self.backend, self.prefill, self.repeats = loaded, backend, prefill, repeats
        self.device = device
        self.clock = clock_for(self.device)
        self.process = new_process()

    def record(self) -> dict[str, Any]:
        """What every record says of where its times were taken."""
        return {
            "process": self.process,
            "clock": self.clock.name,
            "backend": pick_backend(self.backend, self.device),
            "device": environment.device_name(self.device),
        }

    def measure(self, tokens: torch.Tensor, contenders: Sequence[Contender]) -> Iterator[dict[str, Any]]:
        """What each contender takes to read prompts together, int64 (B, S) without padding. Each reads them once
        without a clock; then they take turns. One that runs out of memory takes no more and is told of at once."""
        ready: dict[Contender, tuple[Method, int | None]] = {}
        for contender in contenders:
            match self._attempt(partial(self._warm, tokens, contender)):
                case OutOfMemory() as out:
                    yield {"method": contender.label, "out_of_memory": out.said}
                case warm:
                    ready[contender] = warm
        readings: dict[Contender, list[Reading]] = {contender: [] for contender in ready}
        for _ in range(self.repeats):
            for contender in list(readings):
                match self._attempt(partial(self._read, tokens, ready[contender][0])):
                    case OutOfMemory() as out:
                        del readings[contender]
                        yield {"method": contender.label, "out_of_memory": out.said}
                    case Reading() as reading:
                        readings[contender].append(reading)
        for contender, several in readings.items():
            yield {"method": contender.label, "driver_memory_bytes": ready[contender][1], **_numbers(several)}

    def _warm(self, tokens: torch.Tensor, contender: Contender) -> tuple[Method, int | None]:
        """A contender's method, once over the prompt, and what the driver then has in use on the device: the allocator
        gives nothing back by itself, so that is the most it held."""
        method = contender.make(lambda: self._fill(tokens))
        environment.release_memory(self.device)
        self._read(tokens, method)
        return method, environment.driver_memory(self.device)

    def _read(self, tokens: torch.Tensor, method: Method) -> Reading:
        environment.reset_peak_memory(self.device)
        with bsfa.apply(self.loaded.model, method, backend=self.backend, clock=self.clock) as applied:
            environment.wait(self.device)
            with self.clock.span() as seconds:
                self._fill(tokens).argmax(-1)
            return Reading(
                seconds(),
                applied.attention_seconds(),
                environment.mean_over_processes(applied.skip_ratio(), self.device),
                environment.peak_memory(self.device),
            )

    def _attempt(self, action: Callable[[], T]) -> T | OutOfMemory:
        """What an action gives, or what the allocator said; then all that the action held is free again."""
        try:
            return action()
        except torch.OutOfMemoryError as error:
            said = reason(error)
        gc.collect()
        environment.release_memory(self.device)
        return OutOfMemory(said)

    def _fill(self, tokens: torch.Tensor) -> torch.Tensor:
        model = self.loaded.model
        return self.prefill.read(model, tokens, self.prefill.cache(model, tokens.shape[1]))


def _numbers(readings: Sequence[Reading]) -> dict[str, Any]:
    low, middle, high = quartiles([reading.ttft for reading in readings])
    _, attention, _ = quartiles([reading.attention for reading in readings])
    return {
        "ttft_s": middle,
        "ttft_q25_s": low,
        "ttft_q75_s": high,
        "turns_s": [reading.ttft for reading in readings],
        "attention_s": attention,
        "attention_turns_s": [reading.attention for reading in readings],
        "attention_share": attention / middle,
        "skip_ratio": readings[-1].skip_ratio,
        "peak_memory_bytes": max(reading.peak_memory for reading in readings),
    }
