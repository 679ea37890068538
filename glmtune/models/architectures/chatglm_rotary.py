"""Rotary positions of ChatGLM-6B: every head is shared out among the position streams, each turning its part.

With two streams (place in the context, place in the answer) a head of H channels is two halves, each rotated
as a head of its own by one of the two positions::

    head  [ . . . . . . . . | . . . . . . . . ]      H = 128
            first position    second position        W = 64 each, channel i paired with i + 32

Shapes: B rows, S tokens, N heads, H channels of a head, T position streams, W = H / T.

Source:
    Su et al. 2021, arXiv:2104.09864; ``RotaryEmbedding`` in ``modeling_chatglm.py`` of THUDM/chatglm-6b.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glmtune.models.architectures.chatglm_config import ChatGlmConfig

ROPE_BASE = 10000.0
"""Fixed in the release, which has no setting for it."""


class ChatGlmRotaryEmbedding(nn.Module):
    """Cosines and sines of the position streams; nothing is stored, checkpoints' tables are ignored."""

    def __init__(self, config: ChatGlmConfig) -> None:
        """Read the width of a stream's share of a head."""
        super().__init__()
        self.width = config.head_dim // config.num_position_streams

    def inv_freq(self, device: torch.device | None = None) -> Tensor:
        """Return the turn per position, float32 ``[W / 2]``, rounded to float16 as the release rounds it.

        The weights were trained with the rounded numbers: at position 1,000 exact ones are up to a
        quarter of a radian off.
        """
        exponent = torch.arange(0, self.width, 2, dtype=torch.float32, device=device) / self.width
        return (1.0 / ROPE_BASE**exponent).half().float()

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Form the tables of a batch.

        Args:
            x: any tensor of the wanted dtype and device.
            position_ids: int64 ``[B, T, S]``.

        Returns:
            Cosine and sine, each ``[B, S, 1, T, W]``; the angles are float32.
        """
        angles = position_ids.to(x.device).transpose(1, 2)[:, :, None, :, None].float() * self.inv_freq(
            x.device
        )
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(heads_BSNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every stream's share of a head by its position, pairing channel i with i + W/2 inside the share.

    Args:
        heads_BSNH: queries or keys.
        cos: ``[B, S, 1, T, W]``.
        sin: ``[B, S, 1, T, W]``.

    Returns:
        ``[B, S, N, H]``.
    """
    shares = heads_BSNH.unflatten(-1, cos.shape[-2:])
    first, second = shares.chunk(2, dim=-1)
    return (shares * cos + torch.cat((-second, first), dim=-1) * sin).flatten(-2)
