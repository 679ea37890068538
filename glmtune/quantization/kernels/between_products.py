"""What stands between the products of a GLM's layer on a CPU, each in one call: RMSNorm and rotary embedding.

For one token the time of an operation is that of calling it. transformers takes 7 operations for a norm and
some 30 to turn queries and keys; with 28 layers they were a seventh of a token's time. The compiled loops
(``between_products.cpp``) round where those operations round, so what comes out is the same: turned states
to the last bit, norms up to the order in which squares are added.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.glm import modeling_glm
from transformers.models.glm4 import modeling_glm4

from glmtune.quantization.kernels.native import native_library

DTYPES = (torch.bfloat16, torch.float32)
PARALLEL_NUMBERS = 2**16
"""From so many numbers on all threads take part; fewer are done before a second thread has started."""


class _States(ctypes.Structure):
    """Where states lie, field by field as ``struct States`` in ``csrc/between_products.cpp``."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("batch", "tokens", "heads", "width", "batch_stride", "token_stride")
    )


class _NativeNorm:
    """An RMSNorm in one call; whatever that does not take, its parent computes."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return ``weight * (x / sqrt(mean(x²) + epsilon))``: ``[..., I]`` to ``[..., I]``."""
        if not _takes(hidden_states, self.weight):
            parent: Any = super()
            return parent.forward(hidden_states)
        return normed(hidden_states.contiguous(), self.weight, self.variance_epsilon)


class NativeNorm(_NativeNorm, modeling_glm.GlmRMSNorm):
    """That of `GlmForCausalLM`."""


class NativeGlm4Norm(_NativeNorm, modeling_glm4.Glm4RMSNorm):
    """That of `Glm4ForCausalLM`, which is the same class under another name."""


NORMS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_glm.GlmRMSNorm: NativeNorm,
    modeling_glm4.Glm4RMSNorm: NativeGlm4Norm,
}
"""transformers' class → ours."""
Rotation = Callable[..., tuple[Tensor, Tensor]]


def use_calls_between_products(model: nn.Module) -> int:
    """Let a GLM's norms and rotary embeddings run natively, where they can be compiled.

    Rotary embeddings are a function of transformers' modules, which is replaced for the whole process: it
    gives the same numbers, and calls the one it replaces for whatever it does not take.

    Args:
        model: mutated: its norms change their class, with the same parameters.

    Returns:
        How many norms were changed.
    """
    if native_library().refusal:
        return 0
    norms = [module for module in model.modules() if type(module) in NORMS]
    for norm in norms:
        norm.__class__ = NORMS[type(norm)]
    owners: tuple[Any, ...] = (modeling_glm, modeling_glm4) if norms else ()
    for owner in owners:
        if not hasattr(owner.apply_rotary_pos_emb, "__wrapped__"):
            owner.apply_rotary_pos_emb = _native_rotation(owner.apply_rotary_pos_emb)
    return len(norms)


def _native_rotation(original: Rotation) -> Rotation:
    @functools.wraps(original)
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        taken = unsqueeze_dim == 1 and q.dim() == k.dim() == 4 and _takes(q, k, cos, sin)
        taken = taken and native_library().functions is not None
        if not taken or not _has_whole_tokens(q) or not _has_whole_tokens(k) or cos.stride() != sin.stride():
            return original(q, k, cos, sin, unsqueeze_dim)
        return rotated(q, cos, sin), rotated(k, cos, sin)

    return rotation


def rotated(states_BNSH: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
    """Turn queries or keys, ``[B, N, S, H]``, by the angles of their tokens.

    Args:
        states_BNSH: bfloat16 or float32, the heads of a token behind one another in memory.
        cos_BSR: of the same type, ``[B or 1, S, R]``; the second half of R repeats the first.
        sin_BSR: the same, with the same strides.
    """
    batch, heads, tokens, width = states_BNSH.shape
    shape = _States(batch, tokens, heads, width, states_BNSH.stride(0), states_BNSH.stride(2))
    out_BSNH = states_BNSH.new_empty(batch, tokens, heads, width)
    # The angles of the first half of a row stand for pairs; the second half repeats them.
    native_library().functions.glmtune_rotate(
        *(states_BNSH.data_ptr(), ctypes.addressof(shape), cos_BSR.data_ptr(), sin_BSR.data_ptr()),
        *(cos_BSR.stride(0) if len(cos_BSR) > 1 else 0, cos_BSR.stride(1), cos_BSR.shape[-1]),
        *(states_BNSH.dtype == torch.bfloat16, out_BSNH.data_ptr(), _threads(states_BNSH)),
    )
    return out_BSNH.transpose(1, 2)


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return ``weight * (x / sqrt(mean(x²) + epsilon))``, ``[..., I]``: contiguous, one type of `DTYPES`."""
    out, width = torch.empty_like(x), weight.numel()
    native_library().functions.glmtune_rms_norm(
        *(x.data_ptr(), weight.data_ptr(), x.numel() // width, width, epsilon),
        *(x.dtype == torch.bfloat16, out.data_ptr(), _threads(x)),
    )
    return out


def _takes(*tensors: Tensor) -> bool:
    first = tensors[0]
    return (
        first.dtype in DTYPES
        and all(each.device.type == "cpu" and each.dtype == first.dtype for each in tensors)
        and first.numel() > 0
        # The compiled functions are no operations of PyTorch, which it could differentiate, cast or trace.
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _has_whole_tokens(states_BNSH: Tensor) -> bool:
    """Say whether the heads of a token lie behind one another, as projections leave them."""
    return states_BNSH.stride(3) == 1 and states_BNSH.stride(1) == states_BNSH.shape[3]


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= PARALLEL_NUMBERS else 1
