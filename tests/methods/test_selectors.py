"""Every selector against its own rule, head by head and block by block."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bsfa.blocks import BlockLists
from bsfa.methods import Blasst, Call, FlashPrefill, FlexPrefill, SpargeAttn, SpargeAttnTopK, XAttention
from bsfa.methods.minference import HeadPatterns
from bsfa.patterns import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH, Pattern
from tests.methods import oracles
from tests.methods.oracles import Sees


def topical(batch: int, length: int, heads: int) -> torch.Tensor:
    """Tokens (B, S, H, 16) of which neighbours are alike, so that a block's mean says something of it."""
    topics = torch.randn(batch, -(-length // 48), heads, 16).repeat_interleave(48, 1)
    return topics[:, :length] * 1.5 + torch.randn(batch, length, heads, 16)


@st.composite
def prefills(draw, offsets: tuple[int, ...] = (0,)) -> Call:
    """A causal call: GQA groups, ragged ends, sliding windows."""
    queries, offset = draw(st.sampled_from([897, 768, 600, 333, 130, 1])), draw(st.sampled_from(offsets))
    batch, n_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    q = topical(batch, queries, n_kv * group)
    k, v = topical(batch, queries + offset, n_kv), topical(batch, queries + offset, n_kv)
    return Call(0, q, k, v, window_size=draw(st.sampled_from([(-1, -1), (-1, -1), (300, 0)])))


def mask(lists: BlockLists, n_k: int) -> torch.Tensor:
    """Lists as a bool tensor (B, Hq, n_q, n_k)."""
    valid = torch.arange(lists.indices.shape[-1]) < lists.counts[..., None]
    found = torch.zeros(*lists.counts.shape, n_k + 1, dtype=torch.bool)
    return found.scatter(-1, torch.where(valid, lists.indices.long(), n_k), True)[..., :n_k]


def check(call: Call, found: BlockLists, expected: Callable[[np.ndarray, np.ndarray, Sees, int], np.ndarray]) -> None:
    """Compare with an oracle of one head: its blocks, cut to what they see, cover ours and nothing else does."""
    group = call.q.shape[2] // call.k.shape[2]
    sees = Sees(call.q.shape[1], call.k.shape[1], call.window_size[0])
    ours = sees.blocks(128, 64)
    kept = mask(found, ours.shape[1])
    for b, h in np.ndindex(call.q.shape[0], call.q.shape[2]):
        q, k = call.q[b, :, h].double().numpy(), call.k[b, :, h // group].double().numpy()
        native = expected(q, k, sees, h)
        size_q = 128 if len(native) == len(ours) else 64
        size_k = 64 if native.shape[1] == ours.shape[1] else 128
        native = native & sees.blocks(size_q, size_k)
        for i, j in np.ndindex(*ours.shape):
            halves = native[i * (128 // size_q) : (i + 1) * (128 // size_q), j * 64 // size_k]
            assert kept[b, h, i, j] == (ours[i, j] and halves.any()), (b, h, i, j)


SLOW = settings(max_examples=10, derandomize=True, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes


@SLOW
@given(prefills((0, 128, 200)), st.sampled_from([0.3, 0.7, 0.9]), st.sampled_from([8, 16]))
def test_xattention(call, threshold, stride):
    method = XAttention(threshold, stride)
    check(call, method.select(call), lambda q, k, sees, h: oracles.xattention(q, k, sees, method))


@SLOW
@given(prefills((0, 128, 200)), st.sampled_from([0.05, 0.3, 1.0]), st.integers(0, 2), st.integers(1, 2))
def test_flashprefill(call, alpha, sinks, window):
    method = FlashPrefill(alpha, sinks, window, last_full_blocks=0)
    check(call, method.select(call), lambda q, k, sees, h: oracles.flashprefill(q, k, sees, method))


@SLOW
@given(prefills())
def test_flashprefill_keeps_all_of_the_last_query_blocks(call):
    method = FlashPrefill(0.5, 0, 1, last_full_blocks=1)
    check(call, method.select(call), lambda q, k, sees, h: oracles.flashprefill(q, k, sees, method))


@SLOW
@given(
    prefills(),
    st.sampled_from([SpargeAttn(0.3, 0.9), SpargeAttn(-1, 0.5), SpargeAttnTopK(0.3, 0.3), SpargeAttnTopK(-1, 0.2)]),
)
def test_spargeattn(call, method):
    check(call, method.select(call), lambda q, k, sees, h: oracles.spargeattn(q, k, sees, method))


@SLOW
@given(prefills(), st.sampled_from([0.4, 0.6, 0.8]), st.sampled_from([1.0, 0.0, 0.2]), st.sampled_from([1, 200]))
def test_flexprefill(call, gamma, tau, budget):
    method = FlexPrefill(gamma, tau, budget)
    check(call, method.select(call), lambda q, k, sees, h: oracles.flexprefill(q, k, sees, method))


@SLOW
@given(
    prefills(),
    st.lists(
        st.sampled_from(
            [
                Pattern(VERTICAL_SLASH, 40, 150),
                Pattern(VERTICAL_SLASH, 0, 0),
                Pattern(A_SHAPE, 80, 130),
                Pattern(BLOCK_SPARSE, 0, 0),
            ]
        ),
        min_size=4,
        max_size=4,
    ),
)
def test_minference(call, patterns):
    patterns = patterns[: call.q.shape[2]]
    published = [p._replace(vertical=p.vertical * 50, slash=p.slash * 50) for p in patterns]
    heads = HeadPatterns.of(published, ratio=0.02, device=torch.device("cpu"))  # and 2 of a block-sparse head's 100
    sized = [p._replace(vertical=2) if p.kind == BLOCK_SPARSE else p for p in patterns]
    check(call, heads.select(call), lambda q, k, sees, h: oracles.minference(q, k, sees, sized[h]))


@SLOW
@given(prefills((0, 128)), st.sampled_from([0.02, 0.3, 1.0]))
def test_blasst(call, threshold):
    keys = call.k.shape[1]
    found = Blasst(threshold * keys).attend(call)
    group, scale = call.q.shape[2] // call.k.shape[2], 1 / math.sqrt(call.q.shape[3])
    sees = Sees(call.q.shape[1], keys, call.window_size[0])
    for b, h in np.ndindex(call.q.shape[0], call.q.shape[2]):
        scores = call.q[b, :, h].double().numpy() @ call.k[b, :, h // group].double().numpy().T * scale
        scores[~sees.entries()] = -np.inf
        kept = 0
        for _, rows in oracles.runs(sees.queries, 128):
            running = np.full(rows.stop - rows.start, -np.inf)
            for j, columns in oracles.runs(keys, 64):
                highest = scores[rows, columns].max(1)
                noticed = (highest > -np.inf) & (highest >= running + math.log(threshold))
                if (highest > -np.inf).any() and (j == 0 or noticed.any()):
                    kept += 1
                    running = np.maximum(running, highest)
        assert found.stats.kept[b, h] == kept
