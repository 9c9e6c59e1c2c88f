"""Run a transformers decoder's prefill through a method: ``with bsfa.apply(model, method): model.generate(...)``.

The method is registered under a name of its own with both of transformers' interfaces (attention and mask; without
the second a padding mask would be dropped in silence) and the decoder's attention implementation is set to it, and
set back on leaving. Decode steps, one query each, run densely through PyTorch's SDPA.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bsfa.attention import Attended, Backend, SkipStats
from bsfa.clock import Clock
from bsfa.errors import InputError
from bsfa.methods.base import Attend, Call, Method
from bsfa.model import describe
from bsfa.packing import Packing
from bsfa.padding import Padding, attend_packed

_serial = itertools.count()


@dataclass
class Applied:
    """What ran under one `apply`, prefill calls alone, by layer.

    Attributes
    ----------
    stats : dict of int to list of SkipStats
    seconds : dict of int to list of functions that give a call's seconds, where `apply` had a clock
    """

    stats: dict[int, list[SkipStats]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[int, list[Callable[[], float]]] = field(default_factory=lambda: defaultdict(list))

    def reset(self) -> None:
        """Forget what ran so far."""
        self.stats.clear()
        self.seconds.clear()

    def skip_ratio_by_layer(self) -> list[float]:
        """1 - kept / total of each layer that ran, over batch and heads, in layer order. Waits for a GPU."""
        return [_skip_ratio(self.stats[layer]) for layer in sorted(self.stats)]

    def skip_ratio(self) -> float:
        """1 - kept / total over all that ran. Waits for a GPU."""
        return _skip_ratio(list(itertools.chain.from_iterable(self.stats.values())))

    def attention_seconds(self) -> float:
        """Seconds in attention, selection included. Waits for a GPU."""
        return sum(seconds() for calls in self.seconds.values() for seconds in calls)


def _skip_ratio(stats: list[SkipStats]) -> float:
    kept, total = (sum(int(x.sum()) for x in column) for column in ([s.kept for s in stats], [s.total for s in stats]))
    return 1.0 - kept / total if total else 0.0


@contextmanager
def apply(
    model: PreTrainedModel, method: Method, *, backend: Backend = "auto", clock: Clock | None = None
) -> Iterator[Applied]:
    """Run the model's prefill attention through a method inside the ``with`` block; it is restored on leaving.

    Parameters
    ----------
    model : PreTrainedModel
        A causal decoder on transformers' attention interface.
    method : Method
        From `bsfa.methods`.
    backend : {"auto", "reference", "cuda"}
        As in `bsfa.flash_attn_func`.
    clock : Clock, optional
        Times every attention call, see `bsfa.clock`.

    Yields
    ------
    Applied

    Raises
    ------
    InputError
        A model that cannot be served, a method calibrated for another one.
    NotImplementedError
        In a forward pass: attention dropout, a custom or packed mask.
    """
    info = describe(model)
    applied = Applied()
    # A forward pass hands one mask, or two where some layers slide, to all of its layers: each is read once. As keys
    # tensors count by identity.
    padding, packing = lru_cache(maxsize=2)(Padding.of), lru_cache(maxsize=1)(Packing.cumulative)
    adapter = _Adapter(method.bind(info), method.packs, backend, clock, applied, padding, packing)
    name = f"bsfa-{next(_serial)}"  # and no more: one with "flash" in it would be looked up on the hub
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    AttentionInterface.register(name, adapter.attention)
    AttentionMaskInterface.register(name, prefill_mask)
    try:
        decoder.set_attn_implementation(name)
        if decoder.config._attn_implementation != name:
            raise InputError(f"{type(model).__name__} does not let its attention be set; bsfa cannot serve it")
        yield applied
    finally:
        decoder.set_attn_implementation(before)
        del AttentionInterface._global_mapping[name]
        del AttentionMaskInterface._global_mapping[name]


def prefill_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **rest,
) -> torch.Tensor | None:
    """The mask of a forward pass, in transformers' mask interface.

    Returns
    -------
    For a decode step SDPA's 4-D mask. For a prefill, None where every key counts and the last stands under the last
    query; else a bool tensor (B, keys written so far), False at padding. For several sequences in a row an empty 1-D
    one: their lengths come with the call.

    Raises
    ------
    NotImplementedError
        Anything but a causal (or sliding causal) mask with padding.
    """
    if q_length == 1:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap,
            **rest,
        )
    if use_vmap:
        raise NotImplementedError(
            "bsfa serves causal masks with padding; this forward pass asks for a custom one. "
            "Pass a 2-D attention_mask, one sequence a row"
        )
    if not allow_is_causal_skip:  # transformers has seen position ids that start again
        return torch.empty(0, dtype=torch.bool, device=rest.get("device", "cpu"))
    if int(kv_offset):
        raise NotImplementedError(
            f"a sliding-window cache has dropped its first {int(kv_offset)} keys; "
            "prefill in one piece, or with a cache that keeps them"
        )
    written = int(q_offset) + q_length
    padding = attention_mask[:, :written] if attention_mask is not None else None
    if padding is not None and bool(padding.all()):
        padding = None
    if padding is None and written < kv_length:  # a static cache: its tail is not written yet
        return torch.ones(batch_size, written, dtype=torch.bool, device=rest.get("device", "cpu"))
    return padding


@dataclass(frozen=True, eq=False)
class _Adapter:
    """One method in the shape of transformers' attention interface."""

    attend: Attend
    packs: bool
    backend: Backend
    clock: Clock | None
    applied: Applied
    padding: Callable[[torch.Tensor, int], Padding]
    packing: Callable[[torch.Tensor, torch.Tensor, int, int], Packing]

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **rest,
    ) -> tuple[torch.Tensor, None]:
        """Heads-first in (B, H, S, D), sequence-first out (B, S, H, D), as the interface has it."""
        if query.shape[2] == 1:
            return _decode(module, query, key, value, attention_mask, dropout, scaling, softcap, **rest)
        return self._prefill(
            module.layer_idx, query, key, value, attention_mask, dropout, scaling, sliding_window, softcap, **rest
        )

    @torch.compiler.disable(reason="bsfa.apply runs a prefill's attention eagerly; compile without fullgraph=True")
    def _prefill(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
        **rest,
    ) -> tuple[torch.Tensor, None]:
        """A method keeps count and may read its own selection: under torch.compile the model is compiled around it."""
        if dropout:
            raise NotImplementedError(f"layer {layer}: attention dropout {dropout}; call model.eval() first")
        if rest.get("s_aux") is not None or rest.get("position_bias") is not None:
            raise NotImplementedError(
                f"layer {layer} has attention sinks or a position bias, which bsfa does not serve"
            )
        if attention_mask is not None and attention_mask.dim() not in (1, 2):
            raise NotImplementedError(
                f"layer {layer}: a {attention_mask.dim()}-D attention mask; bsfa takes a 2-D padding mask (B, keys)"
            )
        call = Call(
            layer=layer,
            q=query.transpose(1, 2),
            k=key.transpose(1, 2),
            v=value.transpose(1, 2),
            softmax_scale=scaling,
            window_size=(sliding_window - 1, 0) if sliding_window else (-1, -1),
            softcap=softcap or 0.0,
            backend=self.backend,
        )
        with self.clock.span(query.device) if self.clock else nullcontext() as seconds:
            if "cu_seq_lens_q" in rest or (attention_mask is not None and attention_mask.dim() == 1):
                attended = self._packed(call, **rest)
            elif attention_mask is not None:
                attended = self.padding(attention_mask, call.q.shape[1]).attend(self.attend, self.packs, call)
            else:
                attended = self.attend(call)
        self.applied.stats[layer].append(attended.stats)
        if seconds:
            self.applied.seconds[layer].append(seconds)
        return attended.out, None

    def _packed(
        self,
        call: Call,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **rest,
    ) -> Attended:
        """Sequences one after the other in a batch of one, by the names that transformers' flash attention takes."""
        if cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
            raise NotImplementedError(
                f"layer {call.layer}: position ids that start again say that the batch is packed; pass cu_seq_lens_q, "
                "cu_seq_lens_k, max_length_q and max_length_k too (DataCollatorWithFlattening makes them), or a 2-D "
                "attention_mask, one sequence a row. Under torch.compile every batch without a cache passes for "
                "packed: use_cache=True, or the mask"
            )
        if len(call.q) != 1:
            raise InputError(f"a packed batch is one row of tokens, got {len(call.q)} rows")
        packing = self.packing(cu_seq_lens_q, cu_seq_lens_k, int(max_length_q), int(max_length_k))
        attended = attend_packed(self.attend, self.packs, call.packed(call.q[0], call.k[0], call.v[0], packing))
        return Attended(attended.out[None], None, attended.stats)


def _decode(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    **rest,
) -> tuple[torch.Tensor, None]:
    """Dense attention of one query a sequence."""
    if not softcap:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **rest)
    group = query.shape[1] // key.shape[1]
    scores = scaling * query.unflatten(1, (-1, group)) @ key[:, :, None].transpose(-1, -2)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    out = scores.float().softmax(-1).to(value.dtype) @ value[:, :, None]
    return out.flatten(1, 2).transpose(1, 2), None
