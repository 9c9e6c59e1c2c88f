"""What the library needs to know of a transformers decoder, and whether it can serve it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bsfa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLED_WEIGHTS = 4096  # weights that go into a fingerprint
FP16_SMALLEST_NORMAL = 2.0**-14


@dataclass(frozen=True)
class ModelInfo:
    """A decoder's attention.

    Attributes
    ----------
    name : str
        The hub id or path it was loaded from.
    fingerprint : str
        Digest of its shape and some weights: the same wherever it was loaded from, in fp32, bf16 or fp16.
    n_heads, n_kv_heads : int
        Of the whole model.
    devices : tuple of torch.device
        The device of each layer's attention.
    tp_rank, tp_size : int
        This process's share in tensor parallelism: it attends with the heads of `heads`.
    """

    name: str
    fingerprint: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    devices: tuple[torch.device, ...]
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def n_layers(self) -> int:
        return len(self.devices)

    @property
    def heads(self) -> slice:
        """The query heads of this process."""
        each = self.n_heads // self.tp_size
        return slice(each * self.tp_rank, each * (self.tp_rank + 1))


def describe(model: PreTrainedModel) -> ModelInfo:
    """The attention of a decoder that the library can serve.

    Raises
    ------
    InputError
        An encoder, attention sinks, chunked attention or attention layers that do not say which layer they are.
    """
    kind = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if not getattr(config, "is_causal", True) or model.config.is_encoder_decoder:
        raise InputError(f"{kind} is not a causal decoder; bsfa serves decoder-only models")
    if "chunked_attention" in (getattr(config, "layer_types", None) or []):
        raise InputError(f"{kind} has chunked-attention layers, which bsfa does not serve")
    for name, module in model.named_modules():
        if getattr(module, "sinks", None) is not None:
            raise InputError(f"{kind}: {name} has learned attention sinks, which bsfa does not serve")
    modules: Iterable[Any] = model.modules()
    layers = {
        module.layer_idx: next(module.parameters()).device
        for module in modules
        if isinstance(getattr(module, "layer_idx", None), int) and getattr(module, "is_causal", False)
    }
    n_layers = config.num_hidden_layers
    tp_rank, tp_size = _tensor_parallel(model)
    if not layers:
        raise InputError(f"{kind} has no causal attention on transformers' attention interface; bsfa cannot serve it")
    if any(device.type == "meta" for device in layers.values()):
        raise InputError(
            f"{kind} has layers that are not in memory (device_map='auto' found too little); bsfa wants them"
        )
    fallback = next(iter(layers.values()))  # of a layer with another kind of mixer, which never calls
    return ModelInfo(
        name=config._name_or_path or model.config._name_or_path,
        fingerprint=fingerprint(model),
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        devices=tuple(layers.get(i, fallback) for i in range(n_layers)),
        tp_rank=tp_rank,
        tp_size=tp_size,
    )


def _tensor_parallel(model: PreTrainedModel) -> tuple[int, int]:
    """Rank and size."""
    size = getattr(model, "tp_size", None) or 1
    weights: Iterable[Any] = model.parameters()
    mesh = next((weight.device_mesh for weight in weights if hasattr(weight, "device_mesh")), None)
    if size == 1 or mesh is None:
        return 0, 1
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_local_rank(), size


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits from the shapes of all weights and a sample of the embedding and the last weights.

    Values are rounded to bf16, and those that fp16 cannot hold as normal numbers are taken for 0, so that the
    dtype a model was loaded in does not matter, nor how many devices it was shared out to.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name.replace('_orig_mod.', '')}{tuple(weight.shape)}".encode())  # torch.compile's
    embedding: Any = model.get_input_embeddings()
    for weight in (embedding.weight, list(model.parameters())[-1]):
        flat = _whole(weight).detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_WEIGHTS)].float().cpu()
        sample = torch.where(sample.abs() < FP16_SMALLEST_NORMAL, 0.0, sample).bfloat16()
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _whole(weight: Any) -> torch.Tensor:
    """A weight, gathered from the processes that it was shared out to; all of them have to ask."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
