"""How far a method's next-token distribution is from dense attention's, on the same running text.

For every text and method: Kullback-Leibler divergence from dense to the method in nats a token, agreement on the most
likely token, negative log-likelihood of the text, and by layer and head the share of blocks skipped, the relative error
of the output and the attention mass dropped. No time is taken: every call is computed densely beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import bsfa
from bsfa.attention import Attended
from bsfa.methods import Dense, Method
from bsfa.methods.base import Attend, Call
from bsfa.model import ModelInfo
from experiments.plans import Planned
from experiments.statistics import bootstrap_interval
from experiments.streams import OWN, Stream, Streams
from experiments.sweep import Bench, Lane, Place, Subject, planned, sweep
from experiments.tasks import folder


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=fidelity``; ``data.root=DIR`` adds the folder's texts to the sources."""
    sweep(cfg, *subject(cfg))


def plan(cfg: DictConfig) -> list[Planned]:
    """What `run` would run."""
    return planned(cfg, *subject(cfg))


def subject(cfg: DictConfig) -> tuple[Fidelity, DictConfig]:
    """The texts, and the settings that a run's identity has of them."""
    settings = cfg.streams
    texts = folder.texts(cfg.data.root) if cfg.data.root else ()
    if texts:
        settings = cast(
            DictConfig, OmegaConf.merge(settings, {"sources": list(dict.fromkeys([*settings.sources, OWN]))})
        )
    streams = instantiate(settings, _partial_=True)(texts=texts)  # in records by digest alone
    return Fidelity(streams), settings


class Fidelity(Subject[Streams]):
    """Texts' distributions, compared."""

    lengths_key: ClassVar[str] = "streams.lengths"
    unit: ClassVar[str] = "text"

    def bench(self, place: Place) -> Bench:
        return Comparison(self.samples, place)

    def summarise(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        low, high = bootstrap_interval([sample["kl"] for sample in samples])
        means = {key: float(np.mean([s[key] for s in samples])) for key in ("kl", "agreement", "nll", "skip_ratio")}
        return {"n": len(samples), **means, "kl_low": low, "kl_high": high}

    def describe(self, summary: dict[str, Any]) -> str:
        return f"KL {summary['kl']:.4f}, skip ratio {summary['skip_ratio']:.3f}"


class Comparison(Bench):
    """A loaded model that reads texts, densely and with each method."""

    def __init__(self, streams: Streams, place: Place) -> None:
        self.streams = streams
        self.place = place

    def measure(self, lanes: Sequence[Lane], advance: Callable[[], Any]) -> None:
        for stream in self.streams.make(self.place.loaded.tokenizer):
            todo = [lane for lane in lanes if stream.id not in lane.writer.done]
            if not todo:
                continue
            dense = self._read(stream, Dense())
            for lane in todo:
                watched = Watched(lane.method)
                lane.writer.append(self._record(stream, lane, dense, self._read(stream, watched), watched.seen))
                advance()

    @torch.inference_mode()
    def _read(self, stream: Stream, method: Method) -> torch.Tensor:
        """Log-probabilities of the tail's tokens: fp32 (tail, vocabulary)."""
        model = self.place.loaded.model
        tokens = torch.tensor([stream.tokens], device=self.place.device)
        with bsfa.apply(model, method, backend=self.place.backend):
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=self.streams.tail + 1).logits
        return logits[0, :-1].float().log_softmax(-1)

    def _record(
        self, stream: Stream, lane: Lane, dense: torch.Tensor, sparse: torch.Tensor, seen: Seen
    ) -> dict[str, Any]:
        target = torch.tensor(stream.tokens[-self.streams.tail :], device=dense.device)[:, None]
        return {
            "id": stream.id,
            "task": "fidelity",
            "source": stream.source,
            "length": stream.length,
            "seed": stream.seed,
            "tokens_hash": stream.tokens_hash,
            "tail": self.streams.tail,
            "kl": float((dense.exp() * (dense - sparse)).sum(-1).mean()),
            "agreement": float((dense.argmax(-1) == sparse.argmax(-1)).float().mean()),
            "nll": -float(sparse.gather(-1, target).mean()),
            "nll_dense": -float(dense.gather(-1, target).mean()),
            **seen.record(),
            **self.place.record(lane),
        }


@dataclass
class Seen:
    """What one reading did, by layer: kept and visible blocks, relative error and dropped mass, (Hq,) each."""

    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    total: dict[int, torch.Tensor] = field(default_factory=dict)
    error: dict[int, torch.Tensor] = field(default_factory=dict)
    dropped: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, layer: int, sparse: Attended, dense: Attended) -> None:
        """One call of one layer."""
        exact = dense.out.float()
        difference = (sparse.out.float() - exact).square().sum((0, 1, 3))
        self.error[layer] = (difference / exact.square().sum((0, 1, 3))).sqrt()
        self.kept[layer], self.total[layer] = sparse.stats.kept.sum(0), sparse.stats.total.sum(0)
        if sparse.lse is not None and dense.lse is not None:  # the packages of others may have none
            self.dropped[layer] = 1 - (sparse.lse - dense.lse).exp().mean((0, 2))

    def record(self) -> dict[str, Any]:
        """The skip ratio over all, and lists by layer of lists by head."""
        kept, total = (sum(int(x.sum()) for x in part.values()) for part in (self.kept, self.total))
        skipped = {layer: 1 - self.kept[layer] / self.total[layer] for layer in self.kept}
        return {
            "skip_ratio": 1 - kept / total,
            "skip_ratio_by_head": _lists(skipped),
            "error_by_head": _lists(self.error),
            "dropped_mass_by_head": _lists(self.dropped),
        }


def _lists(by_layer: dict[int, torch.Tensor]) -> list[list[float]]:
    return [[round(x, 4) for x in by_layer[layer].tolist()] for layer in sorted(by_layer)]


@dataclass(frozen=True)
class Watched(Method):
    """Another method, each of its calls held against dense attention on the same q, k, v."""

    method: Method
    seen: Seen = field(default_factory=Seen)

    name: ClassVar[str] = "watched"

    def bind(self, model: ModelInfo) -> Attend:
        inner, dense = self.method.bind(model), Dense().bind(model)

        def attend(call: Call) -> Attended:
            call = replace(call, return_lse=True)
            attended = inner(call)
            self.seen.add(call.layer, attended, dense(call))
            return attended

        return attend
