"""Unquantized bfloat16 layers on CPUs: a product of their own for few rows, that of PyTorch for many.

With few rows, as in decoding, the time is that of reading the weight; the compiled loop reads it faster.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glmtune.quantization.kernels.native import native_library

MOST_ROWS = 8
"""Above, PyTorch is as fast."""


class FewRowsLinear(nn.Linear):
    """A linear layer whose few-row products are compiled; everything else is its parent's."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``: ``[..., I]`` to ``[..., O]``."""
        if not self._takes(input):
            return super().forward(input)
        x_RI, weight, bias = input.reshape(-1, self.in_features).contiguous(), self.weight, self.bias
        out_RO = input.new_empty(len(x_RI), self.out_features)
        native_library().functions.glmtune_bfloat16_product(
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            *weight.shape,
            x_RI.data_ptr(),
            len(x_RI),
            out_RO.data_ptr(),
            torch.get_num_threads(),
        )
        return out_RO.unflatten(0, input.shape[:-1])

    def _takes(self, input: Tensor) -> bool:
        tensors = [input, self.weight] if self.bias is None else [input, self.weight, self.bias]
        return (
            0 < input.numel() <= MOST_ROWS * self.in_features
            and all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
            and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and self.weight.is_contiguous()
            and (self.bias is None or self.bias.is_contiguous())
        )


def speed_up_few_rows(model: nn.Module) -> int:
    """Let a model's unquantized linear layers on CPUs compute few rows natively, where that can be.

    Args:
        model: mutated: its plain `nn.Linear` layers become `FewRowsLinear`, with the same parameters.

    Returns:
        How many layers were changed.
    """
    if native_library().refusal:
        return 0
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    chosen = [layer for layer in layers if layer.weight.device.type == "cpu"]
    for layer in chosen:
        layer.__class__ = FewRowsLinear
    return len(chosen)
