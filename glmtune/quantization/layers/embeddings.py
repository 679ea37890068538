"""Embedding and head of a loaded model as INT8 codes, for answering.

Every token reads the head once: 0.53 GB of the 3.3 GB that a token of ChatGLM2-6B in INT4 reads. As codes
with a scale per row it is half of that; of the embedding one row is read, and its codes only take less
memory. `glmtune quantize` writes them beside quantized blocks (`QuantizedLayout.embeddings`); here they are
made of a model in memory, whatever its blocks are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.errors import ConfigError
from glmtune.models.architectures.unwrap import unwrapped
from glmtune.models.checkpoints.fingerprint import sampled_signs
from glmtune.models.checkpoints.quantized_layout import INT8_EMBEDDINGS, QuantizedLayout
from glmtune.quantization.arithmetic.chunking import quantize_in_chunks
from glmtune.quantization.arithmetic.methods import method_named
from glmtune.quantization.layers.apply import as_stored, replace_layer, tie_head, with_outer_signs
from glmtune.quantization.layers.linear import QuantizedEmbedding, QuantizedLinear

METHOD = "int8"


def round_embeddings(model: nn.Module) -> None:
    """Turn embedding and head of a model into INT8 codes, a scale per row; nothing where they are already.

    Args:
        model: a causal LM, wrapped by PEFT or not, mutated. Its fingerprint stays what it was. Where its
            blocks are codes of ours, its configuration says what it is now, and it can be saved so.

    Raises:
        ConfigError: they are codes of another width, or an adapter wraps them.
        CheckpointError: a weight is not finite.
    """
    base = cast(PreTrainedModel, unwrapped(model))
    parts: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    if all(_is_int8(part) for part in parts):
        return
    for part in parts:
        if isinstance(part, QuantizedLinear | QuantizedEmbedding):
            raise ConfigError(
                "`quantization_embeddings` is `int8`, but embedding and head of this checkpoint are codes of "
                f"{part.bits} bits already. Leave it out."
            )
        if not isinstance(part, nn.Embedding | nn.Linear):
            raise ConfigError(
                f"`quantization_embeddings` is `int8`, but an adapter wraps embedding or head (here: "
                f"{type(part).__name__}), which are to be rounded. Leave it out, or merge the adapter first "
                "(`glmtune export`)."
            )
    is_tied = parts[0].weight is parts[1].weight
    names = {id(module): name for name, module in base.named_modules()}
    made: list[QuantizedLinear | QuantizedEmbedding] = []
    for part in parts:
        made.append(_rounded(base, names[id(part)], part.weight.detach()))
        part.weight = None  # the weight goes before the next one is rounded, where nobody else holds it
    if is_tied:  # one matrix of codes, as it was one of weights
        made[1].weight, made[1].weight_scale = made[0].weight, made[0].weight_scale
    config: Any = base.config
    layout = QuantizedLayout.of(config)
    if layout is not None:
        layout = dataclasses.replace(layout, embeddings=INT8_EMBEDDINGS)
        signs = [part.source_signs or b"" for part in made]
        with_outer_signs(layout, config, lambda _: signs.pop(0)).put_into(config)  # embedding first
        tie_head(base, layout)


def rounded_embeddings(model: nn.Module) -> str | None:
    """Return ``int8`` where embedding and head are INT8 codes, from a file or rounded; None: they are not.

    Fingerprints do not tell, so what depends on the very numbers asks.

    Args:
        model: a causal LM, wrapped by PEFT or not.
    """
    head = cast(PreTrainedModel, unwrapped(model)).get_output_embeddings()
    return METHOD if getattr(getattr(head, "base_layer", head), "source_signs", None) is not None else None


def _is_int8(part: object) -> bool:
    is_codes = isinstance(part, QuantizedLinear | QuantizedEmbedding)
    return is_codes and part.bits == 8 and part.group_size is None


def _rounded(base: PreTrainedModel, name: str, weight: Tensor) -> QuantizedLinear | QuantizedEmbedding:
    """Put codes in place of a layer."""
    # The numbers of the checkpoint, so that codes are those that `glmtune quantize` writes.
    stored_dtype: torch.dtype | None = getattr(base, "stored_dtype", None)

    def read(start: int, stop: int) -> Tensor:
        return as_stored(weight[start:stop].cpu(), stored_dtype)

    found = quantize_in_chunks(method_named(METHOD), tuple(weight.shape), read, name=name, measure=False)
    codes = replace_layer(base, name, QuantizedLayout(8, method=METHOD))
    with torch.no_grad():
        for part, values in found.tensors.items():
            getattr(codes, part).copy_(values)
    codes.source_signs = sampled_signs(weight)
    return codes
