"""What dropping blocks costs, head by head, as the Fisher information has it.

Let a head's output change by ``d`` (its rows one after the other). To second order the Kullback-Leibler divergence
from the dense next-token distribution to the changed one is ``d^T F d / 2`` with F the Fisher information matrix of the
head's output: the mean over ``y ~ p`` of ``g g^T`` with ``g`` the gradient of ``log p(y)`` (Kullback 1959, ch. 2). With
y sampled from the model at each of the last ``tail`` positions and g the gradient of the sum of their log-likelihoods
(draws are independent given the text, so that mixed terms vanish in the mean), that is in nats a token

    cost = mean over y of (sum over the class's rows of g . d)^2 / (2 tail)

The sum of ``g . d`` over several cells gives, squared, what they cost together; `bsfa.cuts` says how much of that is
believed. ``d`` is what the gate does: each cut of a ladder runs through the kernels on the dense inputs of its layer.
Pruning has ranked weights (LeCun et al. 1990, Optimal Brain Damage) and units (Molchanov et al. 2019) by the same
expansion.

Only the last ``tail`` tokens are looked at, as a prefill is for what is generated after it. A cut that does not change
their distributions is free here, whatever it does to the distributions of earlier tokens.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from bsfa.attention import Attended
from bsfa.calibration import check_texts
from bsfa.cuts import Cuts, check_edges, check_shares
from bsfa.distance import class_rows, share_gate
from bsfa.errors import InputError
from bsfa.finished import Finished
from bsfa.gates import Gate
from bsfa.methods.base import Attend, Call, Method
from bsfa.methods.sdpa import sdpa
from bsfa.model import ModelInfo, describe
from bsfa.provenance import Provenance
from bsfa.transformers import apply

ALL = 1e30  # no entry is worth it: sink and diagonal alone are kept
# About 2.5 apart; each is an attention of every text and layer.
SHARES = (0.0, 1e-3, 3.5e-3, 0.01, 0.025, 0.06, 0.14, 0.35, 0.9, ALL)
EDGES = (2, 4, 8, 16)


def calibrate_cuts(
    model: PreTrainedModel,
    token_batches: Iterable[torch.Tensor],
    shares: Sequence[float] = SHARES,
    edges: Sequence[int] = EDGES,
    *,
    tail: int = 192,
    samples: int = 8,
    seed: int = 0,
    data: str = "",
    partial: Path | None = None,
    progress: bool = True,
) -> Cuts:
    """What each cut keeps and costs, on texts; every row of every batch is one.

    Time: a forward pass, ``samples`` backward passes and ``len(shares)`` times the attention of a text. Memory: what a
    backward pass keeps, and gradients of ``samples * layers * tokens * heads * head size`` numbers; both grow with the
    length of a text, not with its square, where PyTorch's SDPA has a fused kernel (bf16 and fp16 on a GPU, any on a
    CPU).

    Parameters
    ----------
    model : PreTrainedModel
        A decoder that `bsfa.apply` can serve, without a logit soft cap, which SDPA has not.
    token_batches : iterable of int64 (B, S)
        Token ids without padding. Lengths may differ; a class that a text does not reach takes no part of it.
    shares : sequence of float
        The ladder of cuts, from 0.
    edges : sequence of int
        The classes of query blocks, see `bsfa.distance.classes`.
    tail : int
        Tokens at a text's end whose distributions count.
    samples : int
        Draws of the next tokens, one backward pass each.
    seed : int
        Of the draws.
    data : str
        The name of the texts, for the file's provenance.
    partial : Path, optional
        A folder that keeps what every text gave, so that the same call goes on where it was cut. Remove it afterwards.
    progress : bool
        Show a progress bar.

    Raises
    ------
    InputError
        No text, one shorter than the tail or longer than the model's positions, a ladder or classes without order;
        ``partial`` holds another calibration's.
    """
    batches = list(token_batches)
    check_texts(model, batches)
    check_shares(shares)
    check_edges(edges)
    if samples < 1 or not 1 <= tail <= min(tokens.shape[1] for tokens in batches):
        raise InputError(f"tail={tail}, samples={samples}: both from 1, and no text shorter than the tail")
    info = describe(model)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ladder = torch.tensor(shares).log()
    gates = [share_gate(relative.expand(info.n_heads)).to(device) for relative in ladder]
    shape = (info.n_layers, len(shares), info.n_heads, len(edges) + 1)
    origin = Provenance.of(info, batches, data)
    finished = Finished.of(partial, "change", asdict(origin), list(shares), list(edges), tail, samples, seed)

    def read(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        kept, change = torch.zeros(shape, dtype=torch.float64), torch.zeros(*shape, len(tokens) * samples)
        calls, slopes = _slopes(model, tokens.to(device), tail, samples, generator)
        for call, slope in zip(calls, slopes, strict=True):
            blocks, along = _measure(call, slope, gates, edges)
            kept[call.layer], change[call.layer] = blocks.cpu(), along.cpu()
        return {"kept": kept, "change": change, "draws": generator.get_state()}

    kept, changes = torch.zeros(shape, dtype=torch.float64), []
    bar = tqdm(batches, desc="calibrate cuts", unit="batch", disable=not progress, file=sys.stderr)
    with _frozen(model):
        for number, tokens in enumerate(bar):
            found = finished.text(number, functools.partial(read, tokens))
            generator.set_state(found["draws"])
            kept += found["kept"]
            changes.append(found["change"])
    kept /= sum(len(tokens) for tokens in batches)
    by_share = kept.transpose(0, 1).float().contiguous(), torch.cat(changes, -1).transpose(0, 1).contiguous()
    return Cuts(*by_share, tail, tuple(shares), tuple(edges), provenance=origin)


@dataclass(frozen=True, eq=False)
class _Recorder(Method):
    """Dense attention that keeps its calls, and its outputs as leaves or nodes to differentiate by."""

    calls: list[Call] = field(default_factory=list)
    outs: list[torch.Tensor] = field(default_factory=list)

    name: ClassVar[str] = "fisher"

    def bind(self, model: ModelInfo) -> Attend:
        return self._attend

    def _attend(self, call: Call) -> Attended:
        dense = sdpa(call)
        self.calls.append(replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach()))
        self.outs.append(dense.out if dense.out.requires_grad else dense.out.requires_grad_())
        return replace(dense, out=self.outs[-1])


def _slopes(
    model: PreTrainedModel, tokens: torch.Tensor, tail: int, samples: int, generator: torch.Generator
) -> tuple[list[Call], list[torch.Tensor]]:
    """Each layer's call, and the gradients of sampled log-likelihoods by its output, (samples, B, S, Hq, D)."""
    recorder = _Recorder()
    with torch.enable_grad(), apply(model, recorder):
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=tail).logits
        log_p = logits.float().log_softmax(-1)
    likelihoods = log_p.detach().exp().flatten(0, 1)
    draws = torch.multinomial(likelihoods, samples, replacement=True, generator=generator)
    draws = draws.view(*log_p.shape[:2], samples)
    gradients: list[list[torch.Tensor]] = [[] for _ in recorder.outs]
    for n in range(samples):
        drawn = log_p.gather(-1, draws[..., n, None]).sum()
        for layer, slope in zip(
            gradients, torch.autograd.grad(drawn, recorder.outs, retain_graph=n + 1 < samples), strict=True
        ):
            layer.append(slope)
    return recorder.calls, [torch.stack(layer) for layer in gradients]


@torch.no_grad()
def _measure(
    call: Call, slopes: torch.Tensor, gates: Sequence[Gate], edges: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks kept, fp64 (gates, Hq, classes), summed over a batch, and slopes along the error, fp32 (..., B * samples).

    A class of query blocks is one run of rows, so that it is attended as a chunk of a prefill and its blocks are
    counted by the kernel. The first gate keeps all: the same arithmetic without a loss.
    """
    shape = (len(gates), call.q.shape[2], len(edges) + 1)
    kept = torch.zeros(shape, dtype=torch.float64, device=call.q.device)
    along = torch.zeros(*shape, len(call.q) * len(slopes), device=call.q.device)
    for c, rows in enumerate(class_rows(call.q.shape[1], edges)):
        if rows.start == rows.stop:
            continue
        part = replace(call, q=call.q[:, rows], k=call.k[:, : rows.stop], v=call.v[:, : rows.stop])
        slope = slopes[:, :, rows].float()
        exact = part.attend(gate=gates[0])
        for n, gate in enumerate(gates):
            found = part.attend(gate=gate) if n else exact
            error = found.out.float() - exact.out.float()
            kept[n, :, c] = found.stats.kept.sum(0)
            along[n, :, c] = torch.einsum("nbshd,bshd->hbn", slope, error).flatten(1)
    return kept, along


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Weights without gradients: a backward pass then keeps no inputs of theirs."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
