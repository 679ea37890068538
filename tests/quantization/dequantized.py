"""The floating point twin of a quantized model: what its logits and gradients must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.models.checkpoints.quantized_layout import without_layout
from glmtune.quantization.layers.linear import QuantizedEmbedding, QuantizedLinear


def dequantize_model(model: PreTrainedModel) -> None:
    """Put floating point layers with the same weights in the place of a model's codes.

    Args:
        model: mutated; its layers of codes become ordinary ones in the model's own floating type.
    """
    dtype = model.dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            with torch.device("meta"):
                linear = nn.Linear(module.in_features, module.out_features, bias=False, dtype=dtype)
            linear.weight = nn.Parameter(module.dequantized(dtype))
            linear.bias = module.bias
            model.set_submodule(name, linear)
        elif isinstance(module, QuantizedEmbedding):
            rows = nn.Embedding.from_pretrained(module.dequantized(dtype), freeze=False)
            model.set_submodule(name, rows)
    if "_tied_weights_keys" in vars(model):
        del model._tied_weights_keys  # the class's own again
        model.tie_weights()
    without_layout(model.config)


def ids(model: Any) -> Tensor:
    """Some tokens, ``[1, S]``, with those that ChatGLM-6B's positions are counted from."""
    row = torch.arange(5, 17)[None]
    if hasattr(model.config, "gmask_token_id"):
        row[0, 6:8] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    return row


def logits(model: Any) -> Tensor:
    """What a model says to them."""
    with torch.no_grad():
        return model(input_ids=ids(model), use_cache=False).logits
