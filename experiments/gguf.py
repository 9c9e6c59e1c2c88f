"""GGUF files in safetensors, converted once: transformers takes half a minute to read 135M parameters of GGUF, and a
second to read them again from safetensors.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from filelock import FileLock
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer

log = logging.getLogger(__name__)


def converted(file: Path) -> Path:
    """The folder of the same model and tokenizer in safetensors, made where it is missing.

    It lies in the cache that huggingface_hub keeps for other libraries, by the file's digest and the version of
    transformers that read it; ``HF_HOME`` moves it. Processes that want it at once wait for the one that makes it; a
    killed one leaves nothing that is taken for it.

    Parameters
    ----------
    file : Path
        A GGUF file. Weights are kept in float32, which loading casts as it would have cast them.

    Raises
    ------
    OSError, safetensors.SafetensorError
        The cache cannot be written.
    OSError, ValueError
        The file cannot be read.
    """
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()[:16]
    folder = cached_assets_path("bsfa", "gguf", file.stem) / f"{digest}-transformers-{transformers.__version__}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            log.info("%s: converted once, into %s", file.name, folder)
            _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    source, options = file.parent, {"gguf_file": file.name}
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        with _asked_once():
            AutoTokenizer.from_pretrained(source, **options).save_pretrained(partial)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        model.hf_quantizer.remove_quantization_config(model)  # as read, it counts as quantized and is not saved
        model.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _asked_once() -> Iterator[None]:
    """What gguf takes seconds for is kept for the next who asks: transformers parses a file three times, and makes the
    map of tensors' names for every module of a model.
    """
    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in kept.items():
        setattr(gguf, name, cache(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(gguf, name, function)
