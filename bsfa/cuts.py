"""What a share cut keeps and what it costs, and the cuts that buy the fewest blocks for a given loss.

A cell is a layer, a head and a class of query blocks by distance from the end of the prompt. For each cell the file
has, over a ladder of cuts, the blocks kept and the change of the log-likelihood of tokens drawn, from which follows the
loss in nats of KL a token; `bsfa.fisher` measures them. A strength is chosen afterwards, with no new calibration: where
the fewest blocks are kept at a total loss of at most ``kl``, one more block buys the same everywhere, so that one price
in nats a block settles all cells (Everett 1963, generalized Lagrange multipliers; Shoham and Gersho 1988, bit
allocation by equal slopes). With a ``coupling`` above 0 what cells lose together counts too, and `bsfa.descent` goes on
from there.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bsfa.blocks import BLOCK_K, BLOCK_Q
from bsfa.descent import Together
from bsfa.errors import InputError
from bsfa.model import ModelInfo
from bsfa.provenance import Provenance, read, write

AXES = {"layers": 1, "heads": 2, "positions": 3}
PRICES = (-80.0, 30.0)  # logarithms of nats a block, beyond what any loss in fp32 comes to
HALVINGS = 32


@dataclass(frozen=True, eq=False)
class Cuts:
    """A calibration of `bsfa.methods.FisherShare`.

    Attributes
    ----------
    kept : fp32 (n_shares, n_layers, n_heads, n_classes)
        Blocks kept, a mean over the texts. A class that no text reached has kept 0.
    change : fp32 (n_shares, n_layers, n_heads, n_classes, n_samples)
        Change of the log-likelihood of the ``tail`` tokens drawn at a text's end, a sample a text and draw.
    tail : int
    shares : tuple of float
        The cuts, ascending from 0, which keeps every block.
    edges : tuple of int
        Distances in query blocks at which the classes after the first begin, see `bsfa.distance.classes`.
    block_size : (int, int)
        Queries and keys of a block.

    Raises
    ------
    InputError
        NaN, or shapes that do not agree.
    """

    kept: torch.Tensor
    change: torch.Tensor
    tail: int
    shares: tuple[float, ...]
    edges: tuple[int, ...]
    block_size: tuple[int, int] = (BLOCK_Q, BLOCK_K)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        shape = tuple(self.kept.shape)
        if self.kept.dim() != 4 or 0 in self.change.shape or tuple(self.change.shape[:-1]) != shape:
            raise InputError(
                f"kept and change must be tables (shares, layers, heads, classes) and (..., samples), got {shape} and "
                f"{tuple(self.change.shape)}"
            )
        if (len(self.shares), len(self.edges) + 1) != (shape[0], shape[3]):
            raise InputError(
                f"tables {shape} are not for {len(self.shares)} shares and the {len(self.edges) + 1} classes of "
                f"edges={list(self.edges)}"
            )
        check_shares(self.shares)
        check_edges(self.edges)
        if not (self.kept.isfinite().all() and self.change.isfinite().all()):
            raise InputError("cuts hold NaN or infinite changes: calibrate again in fp32 or bf16")

    @property
    def cost(self) -> torch.Tensor:
        """Nats a token lost by each cut alone, as ``kept``."""
        return self.change.square().mean(-1) / (2 * self.tail)

    def select(
        self, kl: float, shared: Sequence[str] = (), most: float = math.inf, coupling: float = 0.0
    ) -> torch.Tensor:
        """The cuts that keep the fewest blocks at a loss of at most ``kl`` nats a token on the calibration texts.

        Parameters
        ----------
        kl : float
            Of all cells; with no coupling a larger one never lowers a cut.
        shared : sequence of {"layers", "heads", "positions"}
            Axes along which all cells have one cut.
        most : float
            No cut is above this share.
        coupling : float
            From 0, which adds the cells' losses up as if their errors were independent, to 1, which believes all that
            the samples say of errors that cancel or agree.

        Returns
        -------
        fp32 (n_layers, n_heads, n_classes), logarithms of shares.

        Raises
        ------
        InputError
            An unknown axis; ``most`` under every cut but 0, so that no block would be skipped.
        """
        level = self._levels(kl, shared, most, coupling)
        return torch.tensor([-math.inf, *map(math.log, self.shares[1:])])[level]

    def skip_ratio(self, kl: float, shared: Sequence[str] = (), most: float = math.inf, coupling: float = 0.0) -> float:
        """The share of blocks that the cuts of `select` skip on the calibration texts."""
        kept = self.kept.gather(0, self._levels(kl, shared, most, coupling)[None])
        return 1 - float(kept.sum() / self.kept[0].sum())

    def _levels(self, kl: float, shared: Sequence[str], most: float, coupling: float) -> torch.Tensor:
        """Numbers of shares: int64 (n_layers, n_heads, n_classes)."""
        allowed = sum(share <= most for share in self.shares)
        if allowed < 2:
            raise InputError(f"most={most:g} is under {self.shares[1]:g}, the lowest cut there is: all would be kept")
        cost, kept, change = self.cost[:allowed].double(), self.kept[:allowed].double(), self.change[:allowed]
        check_shared(shared)
        for axis in shared:
            cost, kept, change = (x.sum(AXES[axis], keepdim=True) for x in (cost, kept, change))
        # A cut that keeps more than a lower one, or costs less, does so by chance.
        cost, kept = cost.cummax(0).values, kept.cummin(0).values
        by_itself, blocks = (x.flatten(1).T.numpy() for x in (cost, kept))  # (cells, shares)
        errors = (change / math.sqrt(2 * self.tail)).flatten(1, -2).transpose(0, 1).contiguous().numpy()
        cells = Together(errors, by_itself, coupling)

        def levels(price: float) -> np.ndarray:
            start = (by_itself + math.exp(price) * blocks).argmin(1)
            return cells.descend(start, math.exp(price) * blocks)

        low, high = PRICES
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            within = cells.loss(levels(middle)) <= kl
            low, high = (middle, high) if within else (low, middle)
        chosen = torch.from_numpy(levels(low)).view(kept.shape[1:]).expand(self.kept.shape[1:]).clone()
        for c in range(1, chosen.shape[-1]):
            if not self.kept[0, ..., c].any():  # no text reached it: as the class before
                chosen[..., c] = chosen[..., c - 1]
        return chosen

    def digest(self) -> str:
        """16 hex digits of the tables."""
        content = b"".join(x.float().contiguous().numpy().tobytes() for x in (self.kept, self.change))
        return hashlib.sha256(content + repr((self.tail, self.shares, self.edges)).encode()).hexdigest()[:16]

    def check(self, model: ModelInfo) -> None:
        """Refuse a model that these cuts were not calibrated for.

        Raises
        ------
        InputError
            Other layers, heads, block size or weights.
        """
        _, layers, heads, _ = self.kept.shape
        self.provenance.check("cuts", layers, heads, self.block_size, model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        settings = {"tail": self.tail, "shares": self.shares, "edges": self.edges, "block_size": self.block_size}
        write(Path(path), {"kept": self.kept, "change": self.change}, settings, self.provenance)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Cuts:
        """Read a file of `save`.

        Raises
        ------
        InputError
            No such file, a truncated one, one that holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no file of cuts at {path}; `experiment=calibrate method=fisher_share` writes one")
        [kept, change], [tail, shares, edges, block_size], origin = read(
            path, "cuts", ["kept", "change"], ["tail", "shares", "edges", "block_size"]
        )
        return cls(kept, change, tail, tuple(shares), tuple(edges), tuple(block_size), origin)


def check_shares(shares: Sequence[float]) -> None:
    """Refuse a ladder that does not rise from 0.

    Raises
    ------
    InputError
    """
    if len(shares) < 2 or shares[0] != 0 or list(shares) != sorted(set(shares)) or not math.isfinite(shares[-1]):
        raise InputError(f"shares={list(shares)} must rise from 0, which keeps every block")


def check_edges(edges: Sequence[int]) -> None:
    """Refuse distances that do not rise from at least 1.

    Raises
    ------
    InputError
    """
    if list(edges) != sorted(set(edges)) or (edges and edges[0] < 1):
        raise InputError(f"edges={list(edges)} must rise, from 1 or more")


def check_shared(shared: Sequence[str]) -> None:
    """Refuse axes that cuts do not have.

    Raises
    ------
    InputError
    """
    for axis in shared:
        if axis not in AXES:
            raise InputError(f"shared={axis} is none of {', '.join(AXES)}")
