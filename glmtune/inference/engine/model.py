"""A causal GLM as the engine sees it: reads prompts, steps with every row, forms logits where asked."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from glmtune.inference.engine.attention import (
    ENGINE_ATTENTION,
    AttentionStates,
    KeysValues,
    ReadStates,
    register_engine_attention,
)
from glmtune.inference.engine.prompt_groups import SharedPrompt, TokenIds
from glmtune.inference.engine.slots import SlotStates
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.architectures.chatglm_inputs import continue_positions, token_positions
from glmtune.models.architectures.unwrap import unwrapped


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading some prompts left behind.

    Attributes:
        last_hidden_BD: hidden state of every prompt's last token, after the final norm.
        layers: keys and values of the prompts' own tokens, padded on the right; empty where not kept.
        lengths: own tokens per prompt, int64 ``[B]``.
        positions: position of every prompt's last token, int64 ``[B, T]``.
    """

    last_hidden_BD: Tensor
    layers: Sequence[KeysValues]
    lengths: Tensor
    positions: Tensor


class EngineModel:
    """A model for inference; weights, attached prefix and adapters are used as they are.

    Attributes:
        config: of the base model.
        device: where the embedding lies.
        dtype: of the hidden state.
        can_share: whether prompts that begin alike may be read as one; not with ChatGLM-6B, whose context
            is seen in both directions.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a causal LM, wrapped by PEFT or not, and put it into evaluation mode."""
        model.eval()
        base = unwrapped(model)
        self.config = base.config
        self._stack, self._head = base.base_model, base.get_output_embeddings()
        weight = base.get_input_embeddings().weight
        self.device: torch.device = weight.device
        # Embeddings of a quantized checkpoint may be codes.
        self.dtype: torch.dtype = weight.dtype if weight.is_floating_point() else torch.float32
        self.can_share = not isinstance(self.config, ChatGlmConfig)
        register_engine_attention()

    @torch.no_grad()
    def read(self, prompts: Sequence[TokenIds], shared: SharedPrompt, *, keep: bool) -> Reading:
        """Read what follows a shared prompt.

        Args:
            prompts: token ids without the shared ones, none empty; ChatGLM-6B: whole prompts.
            shared: the tokens before, which were read already.
            keep: whether to keep keys and values.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width, pad = max(map(len, prompts)), self.config.pad_token_id or 0
        # Padding stands behind a row: causal attention never looks there, so no mask is needed for it.
        rows = [[*prompt, *[pad] * (width - len(prompt))] for prompt in prompts]
        input_ids_BS = torch.tensor(rows, device=self.device)
        position_ids = self._positions(input_ids_BS, len(shared.token_ids))
        states = ReadStates(shared, keep=keep)
        hidden_BSD = self._forward(states, input_ids=input_ids_BS, position_ids=position_ids)
        last = lengths - 1
        streams = position_ids if position_ids.dim() == 3 else position_ids[:, None]
        streams = streams.expand(len(rows), -1, -1)
        return Reading(
            last_hidden_BD=hidden_BSD[torch.arange(len(rows), device=self.device), last],
            layers=states.own,
            lengths=lengths,
            positions=streams.gather(2, last[:, None, None].expand(-1, streams.shape[1], 1))[..., 0],
        )

    def read_shared(self, token_ids: TokenIds, parent: SharedPrompt) -> SharedPrompt:
        """Read a shared prompt, of which ``parent`` holds the first tokens already."""
        known = len(parent.token_ids)
        own = self.read([token_ids[known:]], parent, keep=True).layers
        with torch.no_grad():
            layers = (
                own
                if not parent.layers
                else [
                    (torch.cat([old[0], new[0]], dim=2), torch.cat([old[1], new[1]], dim=2))
                    for old, new in zip(parent.layers, own, strict=True)
                ]
            )
        return SharedPrompt(tuple(token_ids), tuple(layers))

    @torch.no_grad()
    def step(self, tokens: Sequence[int], positions: Tensor, states: SlotStates) -> Tensor:
        """Read one more token per slot.

        Args:
            tokens: one per slot.
            positions: of these tokens, int64 ``[B, T]``.
            states: of the batch, mutated.

        Returns:
            Hidden state ``[B, D]`` after the final norm.
        """
        mask = states.open_column()
        if not self.can_share:
            positions = positions[..., None]  # ChatGLM-6B: two positions per token, ``[B, 2, 1]``
        input_ids_B1 = torch.tensor(tokens, device=self.device)[:, None]
        hidden_B1D = self._forward(
            states, input_ids=input_ids_B1, position_ids=positions, attention_mask=mask
        )
        states.advance()  # last: a step that ran out of memory is repeated, over what it wrote
        return hidden_B1D[:, 0]

    @torch.no_grad()
    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Return float32 logits ``[B, vocab]``."""
        return self._head(hidden_BD).float()

    def next_positions(self, positions: Tensor) -> Tensor:
        """Return the positions ``[B, T]`` that follow given ones."""
        if self.can_share:
            return positions + 1
        return continue_positions(positions[..., None], 2, self.config)[..., -1]

    def _positions(self, input_ids_BS: Tensor, num_before: int) -> Tensor:
        if not self.can_share:
            return token_positions(input_ids_BS, self.config)
        return torch.arange(num_before, num_before + input_ids_BS.shape[1], device=self.device)[None]

    def _forward(self, states: AttentionStates, **inputs: Any) -> Tensor:
        with _attention(self.config, ENGINE_ATTENTION):
            return self._stack(**inputs, use_cache=False, engine_states=states).last_hidden_state


@contextmanager
def _attention(config: Any, name: str) -> Generator[None]:
    """Run a forward pass with another attention implementation; the user's model keeps its own."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
