from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from bsfa import InputError
from bsfa.blocks import BlockGrid
from bsfa.methods import Call, Dense, Sdpa
from bsfa.methods.upstream import Cudnn, FlashAttn2, FlashAttn3, TorchFlash
from bsfa.methods.upstream_flex import Flex, flex_mask
from bsfa.model import ModelInfo

CPU = ModelInfo("m", "f", 4, 2, 16, (torch.device("cpu"),))


def prefill(chunk: int = 200, **options) -> Call:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 200, 4, 16), torch.randn(1, 200, 2, 16), torch.randn(1, 200, 2, 16)
    return Call(0, q[:, -chunk:], k, v, **options)


@pytest.fixture
def not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FlashAttn2(), r"needs the module flash_attn \(.*\): pip install flash-attn$"),
        (FlashAttn3(), r"needs the module fa3_fwd_interface or flash_attn_interface \(.*\): pip install fa3-fwd$"),
        (Cudnn(), "runs on a CUDA GPU alone; use method=sdpa here$"),
    ],
)
def test_what_cannot_run_here_is_one_line(method, message, monkeypatch):
    for module in getattr(method, "modules", ()):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"^method={method.name} {message}") as refusal:
        method.bind(CPU)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("method", "module"),
    [(FlashAttn2(), "flash_attn"), (FlashAttn3(), "fa3_fwd_interface"), (FlashAttn3(), "flash_attn_interface")],
)
def test_flash_attention_is_given_the_whole_call(method, module, monkeypatch):
    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, softcap):
        assert causal
        call = Call(0, q, k, v, softmax_scale, window_size, softcap)
        return Dense().bind(CPU)(call).out

    package = ModuleType(module)
    package.flash_attn_func = flash_attn_func
    for other in method.modules:
        monkeypatch.setitem(sys.modules, other, package if other == module else None)
    call = prefill(70, softmax_scale=0.3, window_size=(60, 0), softcap=5.0)
    found, expected = method.bind(CPU)(call), Dense().bind(CPU)(call)
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.stats.kept, expected.stats.kept)
    assert found.stats.skip_ratio == 0


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("options", [{}, {"window_size": (60, 0)}, {"chunk": 70, "softmax_scale": 0.3}])
def test_flex_attention_sees_what_the_call_sees(options):
    call = prefill(**options)
    torch.testing.assert_close(Flex().bind(CPU)(call).out, Sdpa().bind(CPU)(call).out)


@pytest.mark.usefixtures("not_compiled")
def test_flex_attention_has_no_softcap():
    with pytest.raises(NotImplementedError, match="method=upstream_flex runs no softcap"):
        Flex().bind(CPU)(prefill(softcap=5.0))


@pytest.mark.parametrize("window_size", [(-1, -1), (200, 0)])
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (256, 512), (300, 420)])
def test_flex_attentions_blocks_are_those_of_its_own_mask(queries, keys, window_size):
    mask = flex_mask(BlockGrid(queries, keys, True, window_size), torch.device("cpu"))
    own = create_block_mask(mask.mask_mod, None, None, queries, keys, device="cpu")
    assert torch.equal(mask.to_dense(), own.to_dense())
    assert mask.shape == own.shape
    if queries % 128 == keys % 128 == 0:  # a ragged block, which we call full, would be masked once more
        assert torch.equal(mask.full_kv_num_blocks, own.full_kv_num_blocks)


def test_flex_attentions_mask_of_128k_tokens_is_made_by_blocks():
    mask = flex_mask(BlockGrid(131072, 131072, True), torch.device("cpu"))  # by entry it would take 17 GB
    assert mask.kv_num_blocks.unique().tolist() == [1]
    assert mask.full_kv_num_blocks.flatten().tolist() == list(range(1024))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("method", [Cudnn(), TorchFlash(), Flex(), FlashAttn2(), FlashAttn3()])
def test_on_a_gpu(method):
    gpu = ModelInfo("m", "f", 4, 2, 64, (torch.device("cuda"),))
    try:
        attend = method.bind(gpu)
    except InputError as error:
        pytest.skip(str(error))  # a package that is not installed
    call = prefill()
    q, k, v = (x.repeat(1, 1, 1, 4).to("cuda", torch.bfloat16) for x in (call.q, call.k, call.v))
    found = attend(Call(0, q, k, v)).out
    expected = Dense().bind(gpu)(Call(0, q.float(), k.float(), v.float(), backend="reference")).out
    torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=3e-2)
