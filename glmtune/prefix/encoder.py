"""The prefix encoder of P-Tuning v2: trainable keys and values for every layer of a frozen base.

Shapes: L layers, P prefix length (`pre_seq_len`), B batch, K key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from glmtune.switch.rule import Switch

LayerStates = tuple[tuple[Tensor, Tensor], ...]
"""One pair (keys, values) per layer, each ``[B, K, P, H]``."""


@dataclass(frozen=True, slots=True)
class PrefixShape:
    """The part of a base model's geometry that decides how wide a prefix is.

    Attributes:
        num_layers: L, decoder layers.
        num_kv_heads: K, key/value heads ("groups" in official configs).
        head_dim: H, channels of one head.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def kv_width(self) -> int:
        """Numbers that one prefix position holds: ``L * 2 * K * H``."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    def __str__(self) -> str:
        """Word the shape for error messages.

        >>> str(PrefixShape(28, 2, 128))
        '28 layers x 2 key/value heads x head_dim 128'
        """
        return f"{self.num_layers} layers x {self.num_kv_heads} key/value heads x head_dim {self.head_dim}"


def prefix_shape(config: PretrainedConfig) -> PrefixShape:
    """Read the geometry of a base model from its (native) config."""
    num_heads: int = config.num_attention_heads
    return PrefixShape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
    )


class PrefixEncoder(nn.Module):
    """Yields the prefix keys and values of all layers; parameter names are the official ones.

    Without projection ``embedding.weight`` ``[P, L*2*K*H]`` is the prefix itself. With projection it passes
    through ``trans.0``, tanh, ``trans.2``. A row is laid out as layer, then key before value, then head, then
    channel. The parameters stay float32 and the computation runs in float32, whatever the base runs in and
    whatever ``.to()``, ``.half()`` or autocast ask for.

    The initial values are PyTorch's defaults, as in the official code: N(0, 1) for the embedding and
    Kaiming-uniform for the projection (see `glmtune.prefix.init` for the others).

    Source:
        Liu et al. 2021, arXiv:2110.07602; class ``PrefixEncoder`` of the modelling files of THUDM/ChatGLM-6B
        and THUDM/ChatGLM2-6B.
    """

    def __init__(
        self,
        shape: PrefixShape,
        *,
        pre_seq_len: int,
        hidden_size: int | None = None,
        embedding_width: int | None = None,
        num_gates: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        """Create a randomly initialised prefix.

        Args:
            shape: geometry of the base.
            pre_seq_len: P, positions.
            hidden_size: width of the projection's hidden layer, normally the base's; None: no projection.
            embedding_width: columns of the embedding under projection; None means ``L*2*K*H`` (ChatGLM2 and
                later). ChatGLM-6B uses its hidden size.
            num_gates: N, query heads of a layer: the prefix has a softmax of its own and a gate for each
                (`glmtune.prefix.gate`); None: it has none.
            dropout: fraction of prefix keys and values dropped while training.
        """
        super().__init__()
        self.shape = shape
        self.pre_seq_len = pre_seq_len
        self.prefix_projection = hidden_size is not None
        self.dropout = dropout
        self.strength = 1.0  # what a strength of 1 stands for: another number in an export with a strength
        width = shape.kv_width
        if hidden_size is None:
            self.embedding = nn.Embedding(pre_seq_len, width, dtype=torch.float32)
        else:
            inner = embedding_width or width
            self.embedding = nn.Embedding(pre_seq_len, inner, dtype=torch.float32)
            self.trans = nn.Sequential(
                nn.Linear(inner, hidden_size, dtype=torch.float32),
                nn.Tanh(),
                nn.Linear(hidden_size, width, dtype=torch.float32),
            )
        # A module, as its weight then is gathered like the others under ZeRO-3, and called `gate.weight`.
        self.gate: nn.Embedding | None = None
        if num_gates is not None:
            self.gate = nn.Embedding(shape.num_layers, num_gates, dtype=torch.float32)
            nn.init.zeros_(self.gate.weight)
        self.switch: Switch | None = None  # decides per request, where its file holds a rule
        self._remembered: tuple[object, LayerStates] | None = None

    def forward(self) -> Tensor:
        """Compute the prefix.

        Returns:
            float32 ``[L, 2, P, K, H]``: keys (index 0 of the second dimension) and values (1), never rotated.
        """
        shape = self.shape
        rows = self.rows().view(self.pre_seq_len, shape.num_layers, 2, shape.num_kv_heads, shape.head_dim)
        return rows.permute(1, 2, 0, 3, 4)

    def rows(self) -> Tensor:
        """Compute the prefix as the embedding of one without projection holds it.

        Returns:
            float32 ``[P, L*2*K*H]``.
        """
        weight = self.embedding.weight
        positions = torch.arange(self.pre_seq_len, device=weight.device)
        with torch.autocast(device_type=weight.device.type, enabled=False):
            # Modules are called, not their weights read: ZeRO-3 gathers partitioned weights in module hooks.
            rows = self.embedding(positions)
            return self.trans(rows) if self.prefix_projection else rows

    def layer_states(self, batch_size: int, dtype: torch.dtype) -> LayerStates:
        """Compute what each layer's attention puts in front of its own keys and values.

        In training mode dropout falls on every batch row separately, as in the official code. In evaluation
        mode without gradients the result is remembered until a parameter or the mode changes, so that
        generating many tokens evaluates the projection once.

        Args:
            batch_size: B.
            dtype: floating type of the result.

        Returns:
            One pair (keys, values) per layer, each ``[B, K, P, H]``.
        """
        if self.training or torch.is_grad_enabled():
            return self._expand(self._split(dtype, batch_size), batch_size)
        identity = self._identity(dtype)
        if identity is None:
            return self._expand(self._split(dtype, 1), batch_size)
        if self._remembered is None or self._remembered[0] != identity:
            self._remembered = (identity, self._split(dtype, 1))
        return self._expand(self._remembered[1], batch_size)

    def layer_gates(self, strength: float = 1.0) -> tuple[Tensor, ...] | None:
        """Compute what attention over the prefix is multiplied by, where it has a softmax of its own.

        Args:
            strength: factor of all gates.

        Returns:
            float32 ``[N]`` per layer, between -1 and 1 at strength 1; None: the prefix has no gate.
        """
        if self.gate is None:
            return None
        device = self.gate.weight.device
        with torch.autocast(device_type=device.type, enabled=False):
            numbers = self.gate(torch.arange(self.shape.num_layers, device=device))
            gates = numbers.float().tanh()
            return (gates if strength == 1 else gates * strength).unbind(0)

    def _split(self, dtype: torch.dtype, batch_size: int) -> LayerStates:
        # Rows of a batch are equal, hence one stands for all, unless dropout makes them differ.
        states = self().to(dtype).transpose(2, 3)[:, :, None]  # [L, 2, 1, K, P, H]
        if self.training and self.dropout > 0:
            states = nn.functional.dropout(states.expand(-1, -1, batch_size, -1, -1, -1), self.dropout)
        # One unbind instead of L selects: the backward of each select fills a whole-size tensor.
        keys_values = [layer.unbind(0) for layer in states.unbind(0)]
        return tuple((keys, values) for keys, values in keys_values)

    @staticmethod
    def _expand(states: LayerStates, batch_size: int) -> LayerStates:
        size = (batch_size, -1, -1, -1)
        return tuple((keys.expand(size), values.expand(size)) for keys, values in states)

    def _identity(self, dtype: torch.dtype) -> object | None:
        """Return what changes whenever the parameters do, or None where that cannot be told."""
        if torch.compiler.is_compiling():
            return None
        weights = list(self.parameters())
        if any(weight.is_inference() for weight in weights):
            return None  # inference tensors count no versions
        return dtype, tuple((weight.data_ptr(), weight.device, weight._version) for weight in weights)

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off and forget the remembered prefix."""
        self._remembered = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every `.to()`, `.half()`, `.cuda()` of this module or of a model holding it passes here: follow to
        # other devices, stay float32.
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype == torch.float32 and moved.dtype != torch.float32:
                return tensor.to(moved.device)
            return moved

        self._remembered = None
        return super()._apply(keep_float32, recurse)

    def __getstate__(self) -> dict[str, object]:
        """Leave the remembered prefix out of copies and pickles."""
        return {**self.__dict__, "_remembered": None}

    def extra_repr(self) -> str:
        """Show length and geometry when printed."""
        gated = "" if self.gate is None else ", gated"
        return f"pre_seq_len={self.pre_seq_len}, {self.shape}, dropout={self.dropout}{gated}"


def describe_shape(encoder: PrefixEncoder) -> str:
    """Word what two prefixes of one base can differ in.

    >>> describe_shape(PrefixEncoder(PrefixShape(2, 2, 8), pre_seq_len=4, hidden_size=16))
    'a prefix of 4 positions through a projection of width 16'
    """
    width = encoder.trans[0].out_features if encoder.prefix_projection else None
    through = "without projection" if width is None else f"through a projection of width {width}"
    kind = "a prefix" if encoder.gate is None else "a gated prefix"
    return f"{kind} of {encoder.pre_seq_len} positions {through}"
