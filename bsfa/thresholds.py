"""The threshold file: one absolute cut per k, layer, head and query-block position."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bsfa.blocks import BLOCK_K, BLOCK_Q
from bsfa.errors import InputError
from bsfa.model import ModelInfo
from bsfa.provenance import Provenance, read, write


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Calibrated thresholds.

    Attributes
    ----------
    values : fp32 (n_k, n_layers, n_heads, n_q_blocks)
        In units of ``softmax_scale * q.k``; -inf keeps every block.
    k_values : tuple of int
        Blocks a query block keeps beside its diagonal band, one entry of ``values`` each.
    block_size : (int, int)
        Queries and keys of a block.

    Raises
    ------
    InputError
        NaN, or shapes that do not agree.
    """

    values: torch.Tensor
    k_values: tuple[int, ...]
    block_size: tuple[int, int] = (BLOCK_Q, BLOCK_K)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        if self.values.dim() != 4 or 0 in shape or not self.values.is_floating_point():
            raise InputError(f"thresholds must be floating-point (k, layers, heads, q blocks), got {shape}")
        if len(self.k_values) != shape[0]:
            raise InputError(f"thresholds hold {shape[0]} tables for the {len(self.k_values)} values k={self.k_values}")
        if self.values.isnan().any():
            raise InputError("thresholds hold NaN: the calibration saw NaN scores; calibrate again in fp32 or bf16")

    def select(self, k: int) -> torch.Tensor:
        """The table of one k: fp32 (n_layers, n_heads, n_q_blocks).

        Raises
        ------
        InputError
            A k that was not calibrated; the message lists those that were.
        """
        if k not in self.k_values:
            raise InputError(f"k={k} is not in the threshold file; it holds k={', '.join(map(str, self.k_values))}")
        return self.values[self.k_values.index(k)].float()

    def digest(self) -> str:
        """16 hex digits of the values."""
        return hashlib.sha256(self.values.float().contiguous().numpy().tobytes()).hexdigest()[:16]

    def check(self, model: ModelInfo) -> None:
        """Refuse a model that these thresholds were not calibrated for.

        Raises
        ------
        InputError
            Other layers, heads, block size or weights.
        """
        _, layers, heads, _ = self.values.shape
        self.provenance.check("thresholds", layers, heads, self.block_size, model)

    def shard(self, rank: int, world_size: int) -> Thresholds:
        """The heads of one tensor-parallel rank.

        Raises
        ------
        InputError
            Heads that cannot be shared out evenly, or no such rank.
        """
        heads = self.values.shape[2]
        if world_size < 1 or heads % world_size or not 0 <= rank < world_size:
            raise InputError(f"{heads} heads cannot be split for rank {rank} of {world_size}")
        return dataclasses.replace(self, values=self.values.chunk(world_size, dim=2)[rank])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        settings = {"k_values": self.k_values, "block_size": self.block_size}
        write(Path(path), {"thresholds": self.values}, settings, self.provenance)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Thresholds:
        """Read a safetensors file, or a ``.pt`` file of the paper's authors.

        Raises
        ------
        InputError
            No such file, a truncated one, one that would execute code, or one that holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no threshold file at {path}; `python run.py experiment=calibrate` writes one")
        return cls._load_official(path) if path.suffix in (".pt", ".pth") else cls._load_safetensors(path)

    @classmethod
    def _load_safetensors(cls, path: Path) -> Thresholds:
        [values], [k_values, block_size], origin = read(path, "threshold", ["thresholds"], ["k_values", "block_size"])
        return cls(values, tuple(k_values), tuple(block_size), origin)

    @classmethod
    def _load_official(cls, path: Path) -> Thresholds:
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{path} is damaged, or would execute code when loaded and is refused; a threshold file holds "
                "tensors, numbers and strings alone"
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} is not a complete .pt file ({error})") from error
        needed = ("thresholds", "k_values", "q_block_size", "k_block_size")
        missing = [key for key in needed if not isinstance(content, dict) or key not in content]
        if missing:
            raise InputError(f"{path} is not a threshold file: it has no {', '.join(missing)}")
        if not isinstance(content["thresholds"], torch.Tensor):
            raise InputError(f"{path}: thresholds must be a tensor, got {type(content['thresholds']).__name__}")
        if content["thresholds"].is_complex():
            raise InputError(f"{path}: thresholds must be real numbers, got {content['thresholds'].dtype}")
        try:
            k_values = tuple(int(k) for k in content["k_values"])
            block_size = (int(content["q_block_size"]), int(content["k_block_size"]))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: k_values and block sizes must be whole numbers ({error})") from error
        aggregation = str(content.get("aggregation_method", "mean"))
        return cls(content["thresholds"].float(), k_values, block_size, Provenance(aggregation=aggregation))
