"""Every kernel compiles with NVRTC on a machine without a GPU, spills nothing, and keeps its wgmma asynchronous."""

from __future__ import annotations

import re

import pytest
import torch

from bsfa import cuda, nvrtc
from bsfa.errors import InputError

try:
    nvrtc.bindings()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

SERIALISED = re.compile(r"C75\d\d")  # ptxas' family of "wgmma serialised" and "wait injected" remarks


@pytest.mark.parametrize("mode", cuda.MODES)
@pytest.mark.parametrize("head_size", cuda.HEAD_SIZES)
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_every_instantiation_compiles_without_spills_or_serialised_wgmma(dtype, head_size, mode):
    instantiation = cuda.instantiate(dtype, head_size, mode)
    cubin = nvrtc.compile_kernel("attention_sm90a.cu", instantiation, "sm_90a", use_cache=False)
    assert cubin.image.startswith(b"\x7fELF")
    assert " 0 bytes spill stores, 0 bytes spill loads" in cubin.log, cubin.log
    assert not SERIALISED.search(cubin.log), cubin.log


def test_a_cubin_comes_back_from_the_disk_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    instantiation = cuda.instantiate(torch.bfloat16, 64, "maxima")
    first = nvrtc.compile_kernel("attention_sm90a.cu", instantiation, "sm_90a")
    again = nvrtc.compile_kernel("attention_sm90a.cu", instantiation, "sm_90a")
    assert (first.image, first.name) == (again.image, again.name)
    assert first.log
    assert not again.log


def test_a_refused_source_shows_the_compilers_words():
    with pytest.raises(RuntimeError, match="no_such_mode"):
        nvrtc.compile_kernel("attention_sm90a.cu", "bsfa::no_such_mode", "sm_90a", use_cache=False)


def test_the_sources_need_no_header_of_anyone_elses():
    for text in nvrtc.sources().values():
        assert not re.search(r"#include\s*<", text)
