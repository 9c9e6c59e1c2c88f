"""What a plan asks of a machine, told before it starts: weights, memory, and the least time that reading takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from experiments.anchors import MATMUL_DEVICE, MATMUL_TFLOPS
from experiments.models import DTYPES, ModelSource
from experiments.plans import Planned

GB = 1e9
HOUR = 3600


@dataclass(frozen=True)
class Size:
    """A model's size, from its configuration alone.

    Attributes
    ----------
    parameters, embeddings : int
        All of them, and those of the input and output embeddings, which a prefill multiplies with for one token.
    cache : int
        Numbers in the keys and values of a token.
    attention : int
        Query heads x head size x layers.
    """

    parameters: int
    embeddings: int
    cache: int
    attention: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Size:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tables = {
            part.weight: part.weight.numel() for part in (model.get_input_embeddings(), model.get_output_embeddings())
        }
        text = config.get_text_config(decoder=True)
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            sum(parameter.numel() for parameter in model.parameters()),
            sum(tables.values()),
            2 * text.num_hidden_layers * text.num_key_value_heads * head,
            text.num_hidden_layers * text.num_attention_heads * head,
        )

    def operations(self, length: int) -> float:
        """Of reading a prompt once, densely: two a weight and token, and both products of causal attention."""
        return 2.0 * (self.parameters - self.embeddings) * length + 2.0 * length**2 * self.attention


def describe(source: ModelSource, plan: Sequence[Planned]) -> Iterator[str]:
    """Lines on what the plan needs; none on the size of a model that is not known before it is loaded."""
    if source.torch_device.type == "cuda" and not torch.cuda.is_available():
        yield "needs a CUDA GPU, and there is none here"
    if (config := source.architecture()) is None:
        return
    if not (plan := [one for one in plan if one.readings and one.left]):
        return
    size, width = Size.of(config), DTYPES[source.dtype].itemsize
    weights, longest = size.parameters * width / GB, max(length for one in plan for length in one.lengths)
    cache = size.cache * width * longest / GB
    yield f"weights: {source.path or source.name}, {size.parameters / GB:.2f} billion parameters, {weights:.1f} GB"
    yield (
        f"memory: {weights:.1f} GB of weights and {cache:.1f} GB of keys and values at {longest:,} tokens, and what "
        "one layer computes with"
    )
    prompts = [
        (size.operations(length), one.left * one.readings / len(one.lengths)) for one in plan for length in one.lengths
    ]
    seconds = sum(operations * times for operations, times in prompts) / MATMUL_TFLOPS / 1e12
    yield (
        f"time: {sum(times for _, times in prompts):,.0f} prompts to read; at least {seconds / HOUR:,.3g} hours on an "
        f"{MATMUL_DEVICE}, were every product dense and at the {MATMUL_TFLOPS:g} TFLOP/s that a large matrix product "
        "reached there; answers and other GPUs take longer. Stopped, it goes on where it was"
    )
