"""Which dense kernels of others take part."""

from __future__ import annotations

import torch

from bsfa.methods import sdpa
from bsfa.model import ModelInfo
from experiments import dense_kernels
from experiments.prefill import Prefill


def test_a_kernel_that_is_not_built_for_the_dtype_is_left_out_and_said_why(monkeypatch, caplog):
    def refuses(call):
        if call.q.dtype == torch.float16:
            raise RuntimeError("This build does not support FP16.\nIts own traceback")
        return torch.zeros_like(call.q)

    monkeypatch.setattr(sdpa, "kernel", refuses)
    model = ModelInfo("tiny", "0", n_heads=4, n_kv_heads=2, head_dim=16, devices=(torch.device("cpu"),) * 2)
    found, left_out = dense_kernels.usable(["sdpa", "upstream_cudnn"], model, torch.float16, Prefill(), 512)
    assert not found
    assert left_out["sdpa"] == "This build does not support FP16."
    assert "CUDA GPU alone" in left_out["upstream_cudnn"]
    assert "sdpa is left out: This build does not support FP16." in caplog.text
    assert list(dense_kernels.usable(["sdpa"], model, torch.bfloat16, Prefill(), 512)[0]) == ["sdpa"]
