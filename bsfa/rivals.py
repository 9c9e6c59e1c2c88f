"""Calibration of the rivals, on the texts that BSFA's thresholds are calibrated on.

* `fit_blasst`: the two scalars of BLASST (arXiv 2512.12087), from a wanted share of skipped blocks to a factor;
* `search_patterns`: MInference's (arXiv 2407.02490) pattern for every head.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from bsfa.attention import Attended
from bsfa.errors import InputError
from bsfa.finished import Finished
from bsfa.methods.base import Attend, Call, Method
from bsfa.methods.blasst import Blasst, BlasstFit
from bsfa.methods.minference import HeadPatterns
from bsfa.model import ModelInfo, describe
from bsfa.patterns import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH, Pattern, Patterns
from bsfa.provenance import Provenance
from bsfa.transformers import Applied, apply

LAMBDAS = tuple(10.0**e for e in (-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5))
FITTED = (0.05, 0.95)  # skip ratios that the exponential is fitted to; beyond, the curve is flat
CANDIDATES = (  # the sizes between which the authors' search chooses
    Pattern(A_SHAPE, 100, 800),
    Pattern(VERTICAL_SLASH, 30, 800),
    Pattern(VERTICAL_SLASH, 100, 750),
    Pattern(VERTICAL_SLASH, 500, 700),
    Pattern(VERTICAL_SLASH, 3500, 100),
    Pattern(BLOCK_SPARSE, 0, 0),
)


def fit_blasst(
    model: PreTrainedModel,
    token_batches: Sequence[torch.Tensor],
    lambdas: Sequence[float] = LAMBDAS,
    *,
    partial: Path | None = None,
    progress: bool = True,
) -> BlasstFit:
    """Fit BLASST's two scalars by least squares of the factor's logarithm against the skip ratio.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder that `bsfa.apply` can serve.
    token_batches : sequence of int64 (B, S)
        Token ids without padding, as for `bsfa.calibrate`.
    lambdas : sequence of float
        Thresholds to measure at, between 0 and 1; every text is run once with each.
    partial : Path, optional
        A folder that keeps what every text gave, so that the same call goes on where it was cut. Remove it afterwards.

    Raises
    ------
    InputError
        Fewer than two of the measured skip ratios differ and lie between 5 and 95%; ``partial`` holds another
        calibration's.
    """
    finished = Finished.of(partial, asdict(Provenance.of(describe(model), token_batches, "")), list(lambdas))

    def read(tokens: torch.Tensor, factor: float) -> dict[str, torch.Tensor]:
        return {"skipped": torch.tensor(_run(model, tokens, Blasst(factor)).skip_ratio(), dtype=torch.float64)}

    points = []
    pairs = [(tokens, threshold * tokens.shape[1]) for threshold in lambdas for tokens in token_batches]
    bar = tqdm(pairs, desc="blasst", unit="text", disable=not progress, file=sys.stderr)
    for number, (tokens, factor) in enumerate(bar):
        ratio = float(finished.text(number, functools.partial(read, tokens, factor))["skipped"])
        if FITTED[0] <= ratio <= FITTED[1]:
            points.append((ratio, math.log(factor)))
    if len({ratio for ratio, _ in points}) < 2:
        raise InputError(
            f"{len(points)} of the skip ratios measured lie between {FITTED[0]:.0%} and {FITTED[1]:.0%}: "
            "BLASST's curve cannot be fitted; give longer texts or other lambdas"
        )
    b, log_a = statistics.linear_regression(*zip(*points, strict=True))
    return BlasstFit(math.exp(log_a), b)


def search_patterns(
    model: PreTrainedModel,
    token_batches: Sequence[torch.Tensor],
    candidates: Sequence[Pattern] = CANDIDATES,
    ratio: float = 1.0,
    *,
    partial: Path | None = None,
    progress: bool = True,
) -> Patterns:
    """The pattern of every head whose sparse output is closest to the dense one.

    Closest is the least squared error of the head's output, summed over all texts; every candidate runs through the
    kernels on the same dense inputs.

    Parameters
    ----------
    model, token_batches, partial
        As for `fit_blasst`.
    candidates : sequence of Pattern
        By default the authors', meant to cost about the same at 30K tokens.
    ratio : float
        Multiplies the candidates' sizes while searching: a text's length over 30K keeps their share of it. What is
        found keeps its published size, for `bsfa.methods.MInference` has the same ratio.
    """
    origin = Provenance.of(describe(model), token_batches, "")
    finished = Finished.of(partial, asdict(origin), list(candidates), ratio)

    def read(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        search = _Search(tuple(candidates), ratio)
        _run(model, tokens, search)
        return {"errors": torch.stack([search.errors[layer] for layer in sorted(search.errors)])}

    bar = tqdm(token_batches, desc="minference", unit="batch", disable=not progress, file=sys.stderr)
    found = [finished.text(number, functools.partial(read, tokens))["errors"] for number, tokens in enumerate(bar)]
    errors = torch.stack(found).sum(0)
    return Patterns(tuple(tuple(candidates[c] for c in best) for best in errors.argmin(1).tolist()))


def _run(model: PreTrainedModel, tokens: torch.Tensor, method: Method) -> Applied:
    decoder, device = model.get_decoder(), next(model.parameters()).device
    with torch.inference_mode(), apply(model, method) as applied:
        decoder(input_ids=tokens.to(device), use_cache=False)
    return applied


@dataclass(frozen=True, eq=False)
class _Search(Method):
    """Dense attention that keeps, on the way, every candidate's error by layer: fp32 (candidates, Hq)."""

    candidates: tuple[Pattern, ...]
    ratio: float
    errors: dict[int, torch.Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "pattern-search"

    def bind(self, model: ModelInfo) -> Attend:
        return self._attend

    def _attend(self, call: Call) -> Attended:
        dense = call.attend()
        errors = []
        for candidate in self.candidates:
            heads = HeadPatterns.of([candidate] * call.q.shape[2], self.ratio, call.q.device)
            sparse = call.attend(blocks=heads.select(call))
            errors.append((sparse.out.float() - dense.out.float()).square().sum((0, 1, 3)))
        self.errors[call.layer] = torch.stack(errors).cpu()
        return dense
