"""Calibration: from texts to thresholds.

The rule is the one of the paper's authors (arXiv 2512.07011): for each layer, head and query-block position, the cut
midway between the k-th and the (k+1)-th largest block maximum off the diagonal band, averaged over the texts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from bsfa.attention import Attended
from bsfa.blocks import BLOCK_K, BLOCK_Q
from bsfa.errors import InputError
from bsfa.methods.base import Attend, Call, Method
from bsfa.methods.sdpa import sdpa
from bsfa.model import ModelInfo, describe
from bsfa.provenance import Provenance
from bsfa.thresholds import Thresholds
from bsfa.transformers import apply

K_VALUES = (16, 32, 64, 96, 128)  # the paper's
CHUNK_BLOCKS = 64  # query blocks whose block maxima stand in memory at once


def calibrate(
    model: PreTrainedModel,
    token_batches: Iterable[torch.Tensor],
    k_values: Sequence[int] = K_VALUES,
    block_size: tuple[int, int] = (BLOCK_Q, BLOCK_K),
    *,
    data: str = "",
    progress: bool = True,
) -> Thresholds:
    """Calibrate BSFA's thresholds on texts; every row of every batch is one.

    Memory grows with the length of a text, not with its square.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder that `bsfa.apply` can serve.
    token_batches : iterable of int64 (B, S)
        Token ids without padding. Lengths may differ; positions that a text does not reach take no part of it.
    k_values : sequence of int
        Blocks a query block is to keep beside its diagonal band. Where it sees no more than k, the cut is -inf.
    block_size : (int, int)
        Only the kernels' own is supported.
    data : str
        The name of the texts, for the file's provenance.
    progress : bool
        Show a progress bar.

    Raises
    ------
    InputError
        No text, a k below 1, another block size, a text longer than the model's positions.
    """
    ks = tuple(sorted(set(k_values)))
    batches = list(token_batches)
    check_texts(model, batches)
    _check(ks, block_size)
    recorder = _Recorder(ks)
    decoder = model.get_decoder()
    device = next(model.parameters()).device
    bar = tqdm(batches, desc="calibrate", unit="batch", disable=not progress, file=sys.stderr)
    with torch.inference_mode(), apply(model, recorder):
        for tokens in bar:
            decoder(input_ids=tokens.to(device), use_cache=False)
    return Thresholds(recorder.mean(), ks, block_size, Provenance.of(describe(model), batches, data))


def check_texts(model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> None:
    """Refuse a model and texts that a calibration cannot run.

    Raises
    ------
    InputError
        A model shared out by tensor parallelism, no text, a batch that is not (B, S), a text longer than the model's
        positions.
    """
    info = describe(model)
    if info.tp_size > 1:
        raise InputError(
            f"{info.name}: calibrate on a model that is not shared out by tensor parallelism (device_map='auto' "
            "spreads a large one); what is calibrated then serves any number of processes"
        )
    if not batches:
        raise InputError("calibration needs at least one text")
    limit = model.config.get_text_config(decoder=True).max_position_embeddings
    for tokens in batches:
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise InputError(f"a batch of token ids must be (B, S), got {tuple(tokens.shape)}")
        if tokens.shape[1] > limit:
            raise InputError(f"a text of {tokens.shape[1]} tokens is beyond the model's {limit} positions")


def _check(ks: tuple[int, ...], block_size: tuple[int, int]) -> None:
    if not ks or ks[0] < 1:
        raise InputError(f"k_values={list(ks)}: every k must be at least 1")
    if tuple(block_size) != (BLOCK_Q, BLOCK_K):
        raise InputError(f"block_size={tuple(block_size)}: only {(BLOCK_Q, BLOCK_K)} is supported")


@dataclass(frozen=True, eq=False)
class _Recorder(Method):
    """Dense attention that sums up every layer's cuts on the way."""

    k_values: tuple[int, ...]
    sums: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (n_k, Hq, n_q) and counts (n_q,)
    counts: dict[int, torch.Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "calibration"

    def bind(self, model: ModelInfo) -> Attend:
        return self._attend

    def _attend(self, call: Call) -> Attended:
        cuts = layer_cuts(call, self.k_values).sum(1).cpu()  # over the batch's texts
        n_q = cuts.shape[-1]
        total = self.sums.get(call.layer, torch.zeros(*cuts.shape[:2], 0))
        count = self.counts.get(call.layer, torch.zeros(0))
        if n_q > total.shape[-1]:
            grow = n_q - total.shape[-1]
            total, count = (torch.nn.functional.pad(x, (0, grow)) for x in (total, count))
        total[..., :n_q] += cuts
        count[:n_q] += len(call.q)
        self.sums[call.layer], self.counts[call.layer] = total, count
        return call.attend() if call.softcap else sdpa(call)

    def mean(self) -> torch.Tensor:
        """fp32 (n_k, n_layers, n_heads, n_q_blocks)."""
        return torch.stack([self.sums[layer] / self.counts[layer] for layer in sorted(self.sums)], dim=1)


def layer_cuts(call: Call, k_values: Sequence[int]) -> torch.Tensor:
    """The cuts of one call: fp32 (n_k, B, Hq, n_q), -inf where a query block sees at most k blocks off its band."""
    width = max(k_values) + 1
    chunks = []
    for part, maxima in call.block_maxima(CHUNK_BLOCKS):
        for i in range(part.n_q):
            maxima[:, :, i, part.band(i).start :] = -torch.inf
        top = maxima.topk(min(width, maxima.shape[-1]), dim=-1).values
        chunks.append(torch.nn.functional.pad(top, (0, width - top.shape[-1]), value=-torch.inf))
    top = torch.cat(chunks, dim=2)
    return torch.stack([(top[..., k - 1] + top[..., k]) / 2 for k in k_values])
