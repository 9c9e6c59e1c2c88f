"""A loaded model as lm-eval's, which asks for one answer at a time and keeps what each one took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from bsfa.transformers import Applied
from experiments.models import Loaded


class WatchedLM(HFLM):
    """lm-eval's own wrapper of a transformers model, at batch size 1.

    Attributes
    ----------
    seen : dict of int to dict
        By document: prompt tokens of its longest request and, over all of them and prefill alone, skip ratio (of all
        layers, and by layer) and seconds in attention.
    """

    def __init__(self, loaded: Loaded, applied: Applied, advance: Callable[[], Any]) -> None:
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
        self.applied = applied
        self.advance = advance
        self.totals: dict[int, Applied] = defaultdict(Applied)
        self.lengths: dict[int, int] = defaultdict(int)
        self.room: dict[int, int] = defaultdict(int)  # tokens of the longest answer

    @property
    def seen(self) -> dict[int, dict[str, Any]]:
        return {
            number: {
                "prompt_tokens": self.lengths[number],
                "skip_ratio": total.skip_ratio(),
                "skip_ratio_by_layer": [round(ratio, 4) for ratio in total.skip_ratio_by_layer()],
                "attention_s": total.attention_seconds(),
            }
            for number, total in self.totals.items()
        }

    def cut(self) -> int:
        """Documents whose prompt leaves no room for an answer, which lm-eval cuts at the start."""
        return sum(length > self.max_length - self.room[number] for number, length in self.lengths.items())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            self.room[request.doc_id] = request.args[1].get("max_gen_toks", self.max_gen_toks)
        return self._singly(super().generate_until, requests)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._singly(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._singly(super().loglikelihood_rolling, requests)

    def _singly(self, answer: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        answers = []
        for request in requests:
            self.applied.reset()
            answers += answer([request], disable_tqdm=True)
            total = self.totals[request.doc_id]
            if request.doc_id not in self.lengths:
                self.advance()
            self.lengths[request.doc_id] = max(self.lengths[request.doc_id], len(self.tok_encode(request.args[0])))
            for layer, stats in self.applied.stats.items():
                total.stats[layer] += stats
            for layer, seconds in self.applied.seconds.items():
                total.seconds[layer] += seconds
        return answers
