from __future__ import annotations

import pytest
import torch
from transformers import Cache

import bsfa
from bsfa import InputError
from bsfa.methods import (
    Blasst,
    BlasstFit,
    Bsfa,
    Dense,
    FittedBlasst,
    FlashPrefill,
    FlexPrefill,
    MInference,
    RowShare,
    SpargeAttn,
    StreamingLLM,
)
from bsfa.methods.upstream import Cudnn, TorchFlash
from experiments.prefill import Prefill


@pytest.mark.parametrize(("length", "chunk"), [(900, 128), (900, 256), (900, 640), (641, 128), (129, 128)])
@pytest.mark.parametrize("name", ["dense", "bsfa", "row_share", "streaming_llm"])
def test_chunks_decide_and_answer_as_the_whole_does(tiny_model, name, length, chunk):
    torch.manual_seed(0)
    tokens = torch.randint(3, 100, (1, length))
    table = bsfa.calibrate(tiny_model, [tokens], [2], progress=False)
    method = {"dense": Dense(), "bsfa": Bsfa(table, 2), "row_share": RowShare(0.05), "streaming_llm": StreamingLLM(2)}

    def read(prefill: Prefill) -> tuple[torch.Tensor, list[torch.Tensor], Cache]:
        cache = prefill.cache(tiny_model, length)
        with bsfa.apply(tiny_model, method[name]) as applied:
            logits = prefill.read(tiny_model, tokens, cache)
        return logits, [sum(stats.kept for stats in applied.stats[layer]) for layer in (0, 1)], cache

    whole, kept, _ = read(Prefill())
    logits, chunked, cache = read(Prefill(chunk))
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(chunked, kept, strict=True))
    assert cache.get_seq_length() == length


@pytest.mark.parametrize("chunk", [0, -128, 100, 8191, "many", 128.0])
def test_a_chunk_that_cuts_a_query_block_is_refused(chunk):
    with pytest.raises(InputError, match=rf"prefill.chunk={chunk} must be a multiple of 128.*null"):
        Prefill(chunk)


def test_methods_that_want_a_prompt_whole_are_named():
    able = [Dense(), RowShare(0.1), StreamingLLM(1), Blasst(8), FlashPrefill(last_full_blocks=0)]
    unable = [FlashPrefill(), FlexPrefill(0.9, 0.1, 1024), MInference(), SpargeAttn(0.9, 0.6), Cudnn(), TorchFlash()]
    Prefill(8192).check(able, 131072)
    Prefill(8192).check(unable, 8192)  # one chunk
    Prefill().check(unable, 131072)
    for method in unable:
        with pytest.raises(InputError, match=f"prefill.chunk=8192: {method.name} wants a prompt in one piece"):
            Prefill(8192).check([*able, method], 131072)


def test_a_prompt_or_a_first_chunk_too_short_for_a_method_is_refused_by_name():
    fewest = [
        (method.name, method.fewest_keys) for method in (Dense(), Blasst(255.5), FittedBlasst(BlasstFit(1, 6), 0.9))
    ]
    assert [keys for _, keys in fewest] == [1, 256, 222]
    Prefill().check_keys(fewest, 256, "task.lengths")
    Prefill(256).check_keys(fewest, 900, "task.lengths")
    with pytest.raises(InputError, match=r"task.lengths: a prompt of 230 tokens .* for blasst \(256 or more\); take"):
        Prefill(256).check_keys(fewest, 230, "task.lengths")
    with pytest.raises(InputError, match=r"prefill.chunk: a first chunk of 128 .* blasst \(256 .*, blasst_fitted"):
        Prefill(128).check_keys(fewest, 900, "task.lengths")
