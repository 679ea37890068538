"""Unquantized bfloat16 layers on CPUs: a compiled product for small batches, that of PyTorch for larger ones.

In a quantized model the head is such a layer: 65,024 to 151,552 outputs, as many bytes as several blocks of
codes. With few rows, as in decoding, the time is that of reading the weight, which the compiled loop
(``bfloat16_product.cpp``) does faster: 4,096 x 16,384, one thread, without bfloat16 instructions, 19 ms
against 32 with one row, 34 against 98 with eight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glmtune.quantization.kernels.native import native_library

MAX_ROWS = 8
"""Above, PyTorch is as fast on a processor with bfloat16 instructions, for which this was set."""


class SmallBatchLinear(nn.Linear):
    """A linear layer with a compiled product for up to `MAX_ROWS` rows; all else is its parent's."""

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
            0 < input.numel() <= MAX_ROWS * self.in_features
            and all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
            # The compiled function is no operation of PyTorch: nothing could differentiate, cast or trace it.
            and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and self.weight.is_contiguous()
            and (self.bias is None or self.bias.is_contiguous())
        )


def use_small_batch_products(model: nn.Module) -> int:
    """Let a model's unquantized linear layers on CPUs compute small batches natively, where that can be.

    Args:
        model: mutated: its plain `nn.Linear` layers become `SmallBatchLinear`, with the same parameters.

    Returns:
        How many layers were changed.
    """
    if native_library().refusal:
        return 0
    # Subclasses have their own forward (layers of codes among them), so only `nn.Linear` itself is changed.
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    chosen = [layer for layer in layers if layer.weight.device.type == "cpu"]
    for layer in chosen:
        layer.__class__ = SmallBatchLinear
    return len(chosen)
