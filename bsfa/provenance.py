"""Where a calibrated table comes from, and the file it is kept in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bsfa.blocks import BLOCK_K, BLOCK_Q
from bsfa.errors import InputError
from bsfa.model import ModelInfo
from bsfa.whole import whole

SCHEMA = 1


@dataclass(frozen=True)
class Provenance:
    """Where a table comes from; what is not known is empty or 0.

    Attributes
    ----------
    model, fingerprint : str
        `ModelInfo.name` and `ModelInfo.fingerprint` of the calibrated model.
    sequence_length, samples : int
        Tokens of the longest calibration text, and the number of texts.
    aggregation : str
        How the texts were joined.
    data, data_hash : str
        The name and the digest of the calibration tokens.
    versions : dict
        Package versions.
    """

    model: str = ""
    fingerprint: str = ""
    sequence_length: int = 0
    samples: int = 0
    aggregation: str = "mean"
    data: str = ""
    data_hash: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelInfo, batches: Sequence[torch.Tensor], data: str) -> Provenance:
        """Of a calibration here and now, on batches of token ids (B, S) by a name."""
        digest = hashlib.sha256()
        for tokens in batches:
            digest.update(tokens.cpu().numpy().tobytes())
        return cls(
            model=model.name,
            fingerprint=model.fingerprint,
            sequence_length=max(tokens.shape[1] for tokens in batches),
            samples=sum(len(tokens) for tokens in batches),
            data=data,
            data_hash=digest.hexdigest()[:16],
            versions={name: version(name) for name in ("torch", "transformers")},
        )

    def check(self, kind: str, layers: int, heads: int, block_size: tuple[int, int], model: ModelInfo) -> None:
        """Refuse a model that a table was not calibrated for; ``kind`` is what an error calls the table.

        Raises
        ------
        InputError
            Other layers, heads, block size or weights.
        """
        origin = f"{kind} of {self.model or 'an unnamed model'}"
        if (layers, heads) != (model.n_layers, model.n_heads):
            raise InputError(
                f"{origin} are for {layers} layers and {heads} heads; {model.name or 'this model'} has "
                f"{model.n_layers} and {model.n_heads}; calibrate it"
            )
        if block_size != (BLOCK_Q, BLOCK_K):
            raise InputError(f"{origin} are for blocks {block_size}; the kernels use {(BLOCK_Q, BLOCK_K)}")
        if self.fingerprint not in ("", model.fingerprint):
            raise InputError(
                f"{origin} ({self.fingerprint}) are not for {model.name or 'this model'} "
                f"({model.fingerprint}): the weights differ; calibrate it"
            )


def write(path: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any], origin: Provenance) -> None:
    """A safetensors file of fp32 tensors, its settings and where it comes from, whole or not at all."""
    metadata = {"schema": SCHEMA, **settings, **dataclasses.asdict(origin)}
    with whole(path) as partial:
        save_file(
            {name: tensor.float().contiguous() for name, tensor in tensors.items()},
            partial,
            {key: json.dumps(value) for key, value in metadata.items()},
        )


def read(
    path: Path, kind: str, tensors: Sequence[str], settings: Sequence[str]
) -> tuple[list[torch.Tensor], list[Any], Provenance]:
    """What `write` wrote: its tensors, its settings and where it comes from.

    Raises
    ------
    InputError
        Another kind of file, another schema, a damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            values = [file.get_tensor(name) for name in tensors]
        if metadata.pop("schema") != SCHEMA:
            raise InputError(f"{path} is of another schema than {SCHEMA}; calibrate again")
        found = [metadata.pop(key) for key in settings]
        return values, found, Provenance(**metadata)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a {kind} file, or is damaged ({error}); calibrate again") from error
