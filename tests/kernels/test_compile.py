"""Every kernel compiles with NVRTC on a machine without a GPU, spills nothing, and keeps its wgmma asynchronous."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bsfa import cuda, launch, launch_screen, nvrtc
from bsfa.errors import InputError

try:
    nvrtc.bindings()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

SERIALISED = re.compile(r"C75\d\d")  # ptxas' family of "wgmma serialised" and "wait injected" remarks


# What every instantiation is compiled for: the sm80 kernel at its lowest, and where it stands in for another.
TARGETS = [("sm90a", "sm_90a"), ("sm80", "sm_80"), ("sm80", "sm_90")]


def compile_all(kernel: str, jobs: list[tuple[str, str]]) -> list[nvrtc.Cubin]:
    """Instantiations, each for its chip, on all cores: NVRTC compiles outside of Python's lock."""
    source = cuda.KERNELS[kernel].source
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: nvrtc.compile_kernel(source, *job, use_cache=False), jobs))


@pytest.mark.parametrize("head_size", cuda.HEAD_SIZES)
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "arch"), TARGETS)
def test_every_instantiation_compiles_without_spills_or_serialised_wgmma(kernel, arch, dtype, head_size):
    modes = cuda.KERNELS[kernel].modes
    compiled = compile_all(kernel, [(launch.instantiate(dtype, head_size, mode), arch) for mode in modes])
    for mode, cubin in zip(modes, compiled, strict=True):
        assert cubin.image.startswith(b"\x7fELF"), mode
        assert " 0 bytes spill stores, 0 bytes spill loads" in cubin.log, f"{mode}: {cubin.log}"
        assert not SERIALISED.search(cubin.log), f"{mode}: {cubin.log}"


@pytest.mark.parametrize("head_size", cuda.HEAD_SIZES)
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("relative", [None, False, True])
def test_the_screen_compiles_without_spills_or_serialised_wgmma(relative, dtype, head_size):
    name = launch_screen.instantiate(dtype, head_size, relative)
    cubin = nvrtc.compile_kernel(launch_screen.SOURCE, name, launch_screen.ARCH, use_cache=False)
    assert " 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in cubin.log, cubin.log
    assert not SERIALISED.search(cubin.log), cubin.log


def test_the_sm80_kernel_compiles_for_later_chips():
    instantiation = launch.instantiate(torch.bfloat16, 128, "gate_max")
    later = compile_all("sm80", [(instantiation, arch) for arch in ("sm_86", "sm_89", "sm_100", "sm_120")])
    assert all(cubin.name for cubin in later)


@pytest.mark.parametrize(
    ("capability", "name", "arch"),
    [((8, 0), "sm80", "sm_80"), ((8, 9), "sm80", "sm_89"), ((9, 0), "sm90a", "sm_90a"), ((12, 0), "sm80", "sm_120")],
)
def test_a_chip_gets_its_kernel(capability, name, arch):
    kernel = next(kernel for kernel in cuda.KERNELS.values() if kernel.serves(*capability))
    assert (kernel.name, kernel.arch(*capability)) == (name, arch)


def test_no_kernel_serves_a_chip_older_than_ampere():
    assert not any(kernel.serves(7, 5) for kernel in cuda.KERNELS.values())


@pytest.mark.parametrize("kernel", cuda.KERNELS.values(), ids=lambda kernel: kernel.name)
def test_a_kernel_reads_rows_of_any_stride_that_keeps_them_aligned(kernel):
    assert kernel.readable((2, 100, 4, 64), (25600, 256, 64, 1), 2)
    assert kernel.readable((2, 100, 4, 64), (25600, 64, 6400, 1), 2)
    assert not kernel.readable((2, 100, 4, 64), (25604, 260, 65, 1), 2)
    assert not kernel.readable((2, 100, 4, 64), (25600, 256, 1, 4), 2)


def test_a_cubin_comes_back_from_the_disk_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    instantiation = launch.instantiate(torch.bfloat16, 64, "maxima")
    first = nvrtc.compile_kernel("attention_sm80.cu", instantiation, "sm_80")
    again = nvrtc.compile_kernel("attention_sm80.cu", instantiation, "sm_80")
    assert (first.image, first.name) == (again.image, again.name)
    assert first.log
    assert not again.log
    monkeypatch.setattr(nvrtc, "_driver_version", lambda: 99999)
    assert nvrtc.compile_kernel("attention_sm80.cu", instantiation, "sm_80").log  # another driver, another cubin


def test_a_refused_source_shows_the_compilers_words():
    with pytest.raises(RuntimeError, match="no_such_mode"):
        nvrtc.compile_kernel("attention_sm80.cu", "bsfa::no_such_mode", "sm_80", use_cache=False)


def test_the_sources_need_no_header_of_anyone_elses():
    for text in nvrtc.sources().values():
        assert not re.search(r"#include\s*<", text)
