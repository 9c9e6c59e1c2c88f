"""Calibration: from texts to thresholds.

The rule is the one of the paper's authors (arXiv 2512.07011): for each layer, head and query-block position, the cut
midway between the k-th and the (k+1)-th largest block maximum off the diagonal band, averaged over the texts.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import PreTrainedModel

from bsfa.attention import Attended
from bsfa.blocks import BLOCK_K, BLOCK_Q
from bsfa.errors import InputError
from bsfa.finished import Finished
from bsfa.methods.base import Attend, Call, Method
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
    partial: Path | None = None,
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
    partial : Path, optional
        A folder that keeps what every text gave, so that the same call goes on where it was cut. Remove it afterwards.
    progress : bool
        Show a progress bar.

    Raises
    ------
    InputError
        No text, a k below 1, another block size, a text longer than the model's positions; ``partial`` holds another
        calibration's.
    """
    ks = tuple(sorted(set(k_values)))
    batches = list(token_batches)
    check_texts(model, batches)
    _check(ks, block_size)
    recorder = _Recorder(ks)
    decoder = model.get_decoder()
    device = next(model.parameters()).device
    origin = Provenance.of(describe(model), batches, data)
    finished = Finished.of(partial, asdict(origin), ks)

    def read(number: int) -> torch.Tensor:
        return finished.text(number, lambda: {"cuts": recorder.read(decoder, batches[number].to(device))})["cuts"]

    with apply(model, recorder), _side_by_side(device, batches) as read_all:
        found = read_all(read, range(len(batches)))
        bar = tqdm(found, "calibrate", len(batches), unit="batch", disable=not progress, file=sys.stderr)
        values = _mean(list(bar), [len(tokens) for tokens in batches])
    return Thresholds(values, ks, block_size, origin)


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


@contextmanager
def _side_by_side(device: torch.device, batches: Sequence[torch.Tensor]) -> Iterator[Callable]:
    """A `map` over texts, in their order. A CPU's threads work on two at once, half on each.

    Two threads of one matrix product wait for each other and for the memory between their caches. Texts of several
    lengths go one by one: some rotary embeddings change with the length.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len({tokens.shape for tokens in batches}) > 1:
        yield map
        return
    pool = ThreadPoolExecutor(2)
    torch.set_num_threads(threads // 2)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _mean(sums: Sequence[torch.Tensor], texts: Sequence[int]) -> torch.Tensor:
    """Sums of cuts (n_k, n_layers, Hq, n_q) over some texts each -> the mean over the texts that reach a position."""
    n_q = max(x.shape[-1] for x in sums)
    counts = [x.new_full((x.shape[-1],), n) for x, n in zip(sums, texts, strict=True)]
    total, count = (torch.stack([pad(x, (0, n_q - x.shape[-1])) for x in xs]).sum(0) for xs in (sums, counts))
    return total / count


@dataclass(frozen=True, eq=False)
class _Recorder(Method):
    """Dense attention that keeps every layer's cuts of the batch that a thread reads."""

    k_values: tuple[int, ...]
    here: threading.local = field(default_factory=threading.local)

    name: ClassVar[str] = "calibration"

    def read(self, decoder: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """A batch (B, S) -> fp32 (n_k, n_layers, Hq, n_q), sums over its texts."""
        self.here.cuts = {}
        with torch.inference_mode():
            decoder(input_ids=tokens, use_cache=False)
        return torch.stack([self.here.cuts[layer] for layer in sorted(self.here.cuts)], dim=1)

    def bind(self, model: ModelInfo) -> Attend:
        return self._attend

    def _attend(self, call: Call) -> Attended:
        out, cuts = layer_cuts(call, self.k_values)
        self.here.cuts[call.layer] = cuts.sum(1).cpu()  # over the batch's texts
        return Attended.dense(out, call.grid)


def layer_cuts(call: Call, k_values: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of one call (B, Sq, Hq, D), and its cuts on the way.

    Those are fp32 (n_k, B, Hq, n_q), -inf where a query block sees at most k blocks off its band.
    """
    width = max(k_values) + 1
    outs, tops = [], []
    for part, out, maxima in call.attend_and_maxima(CHUNK_BLOCKS):
        for i in range(part.n_q):
            maxima[:, :, i, part.band(i).start :] = -torch.inf
        top = maxima.topk(min(width, maxima.shape[-1]), dim=-1).values
        outs.append(out)
        tops.append(pad(top, (0, width - top.shape[-1]), value=-torch.inf))
    top = torch.cat(tops, dim=2)
    return torch.cat(outs, dim=1), torch.stack([(top[..., k - 1] + top[..., k]) / 2 for k in k_values])
