"""Run-time compilation of `kernels/` with NVRTC: source -> cubin -> loaded kernel, each step cached.

No compiler and no GPU is needed to compile: NVRTC is a library, found through cuda-bindings in the wheel that every
CUDA build of PyTorch brings. Cubins are kept under ``$XDG_CACHE_HOME/bsfa`` (``~/.cache/bsfa``) by a hash of the
sources, the options, the instantiation, and the versions of NVRTC and of the driver.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bsfa.errors import InputError

OPTIONS = ("--std=c++20", "--use_fast_math", "--device-as-default-execution-space", "--ptxas-options=-v")
INSTALL_HINT = 'pip install "cuda-bindings>=12.4" nvidia-cuda-nvrtc'


@dataclass(frozen=True)
class Cubin:
    """Device code of one kernel: its image, its mangled name, and what the compiler said (empty from the cache)."""

    image: bytes
    name: str
    log: str


@cache
def bindings() -> tuple[Any, Any]:
    """cuda-bindings' ``driver`` and ``nvrtc`` modules.

    Raises
    ------
    InputError
        They are not installed, or NVRTC's library is not.
    """
    try:
        from cuda.bindings import driver, nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise InputError(f"the CUDA backend needs cuda-bindings and NVRTC ({error}): {INSTALL_HINT}") from None
    return driver, nvrtc


@cache
def sources() -> dict[str, str]:
    """The device sources by file name: ``bsfa/kernels`` in an installed package, ``kernels`` in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "kernels", package.parent / "kernels"):
        found = {path.name: path.read_text() for path in sorted(folder.glob("*.cu*"))}
        if found:
            return found
    raise InputError(f"kernel sources not found beside {package}: the installation is incomplete, reinstall bsfa")


def compile_kernel(source: str, instantiation: str, arch: str, use_cache: bool = True) -> Cubin:
    """Compile one kernel of one source file.

    Parameters
    ----------
    source : str
        File name in `sources`.
    instantiation : str
        C++ expression that names the kernel, ``bsfa::attention<...>``.
    arch : str
        ``sm_90a``, ``sm_80``, ...

    Raises
    ------
    InputError
        NVRTC is missing.
    RuntimeError
        NVRTC refused the source; the message holds its log.
    """
    _, nvrtc = bindings()
    files = sources()
    options = (*OPTIONS, f"--gpu-architecture={arch}")
    versions = nvrtc.nvrtcVersion()[1:], _driver_version()
    key = hashlib.sha256(repr((source, instantiation, options, versions, sorted(files.items()))).encode()).hexdigest()
    path = cache_folder() / f"{key[:32]}.cubin"
    if use_cache and (cached := _read(path)):
        return cached
    cubin = _compile(nvrtc, files, source, instantiation, options)
    _write(path, cubin)
    return cubin


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bsfa"


def load_kernel(cubin: Cubin, shared_bytes: int) -> Any:
    """Load device code into the current context and let the kernel use ``shared_bytes`` of dynamic shared memory.

    Raises
    ------
    RuntimeError
        The driver refused it, most likely for being older than the compiler.
    """
    driver, _ = bindings()
    module = _done(driver, driver.cuModuleLoadData(cubin.image))
    kernel = _done(driver, driver.cuModuleGetFunction(module, cubin.name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _done(driver, driver.cuFuncSetAttribute(kernel, attribute, shared_bytes))
    return kernel


def _driver_version() -> int:
    """What the installed driver supports, such as 13000; 0 on a machine without one."""
    driver, _ = bindings()
    try:
        return _done(driver, driver.cuDriverGetVersion())
    except RuntimeError:
        return 0


def _compile(nvrtc: Any, files: dict[str, str], source: str, instantiation: str, options: tuple[str, ...]) -> Cubin:
    names = [name for name in files if name != source]
    program = _done(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            files[source].encode(),
            source.encode(),
            len(names),
            [files[name].encode() for name in names],
            [name.encode() for name in names],
        ),
    )
    try:
        _done(nvrtc, nvrtc.nvrtcAddNameExpression(program, instantiation.encode()))
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = b" " * _done(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
        _done(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
        text = log.decode(errors="replace").strip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC could not compile {instantiation} ({status.name}):\n{text}")
        image = b" " * _done(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        _done(nvrtc, nvrtc.nvrtcGetCUBIN(program, image))
        name = _done(nvrtc, nvrtc.nvrtcGetLoweredName(program, instantiation.encode()))
        return Cubin(image, name.decode(), text)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(path: Path) -> Cubin | None:
    try:
        name, image = path.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    return Cubin(image, name.decode(), "")


def _write(path: Path, cubin: Cubin) -> None:
    """By rename, so that another process never reads half a file. A cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin.name.encode() + b"\n" + cubin.image)
        os.replace(file.name, path)
    except OSError:
        pass


def _done(module: Any, result: tuple[Any, ...]) -> Any:
    """The value of a cuda-bindings call, or its error as an exception."""
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"{module.__name__.rsplit('.', 1)[-1]}: {status.name}")
    return values[0] if values else None
