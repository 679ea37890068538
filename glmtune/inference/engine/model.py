"""A causal GLM as the engine sees it: reads prompts, steps with every row, forms logits where asked."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from glmtune.errors import ConfigError
from glmtune.inference.engine.attention import (
    ENGINE_ATTENTION,
    AttentionStates,
    KeysValues,
    register_engine_attention,
)
from glmtune.inference.engine.budget import bytes_per_token
from glmtune.inference.engine.prompt_groups import SharedPrompt, TokenIds
from glmtune.inference.engine.reading import Before, ReadStates, last_tokens_only
from glmtune.inference.engine.states.batch_states import BatchStates
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.architectures.chatglm_inputs import token_positions
from glmtune.models.architectures.unwrap import unwrapped
from glmtune.models.checkpoints.finite import check_output
from glmtune.models.later import LaterModel
from glmtune.models.placement import layer_devices
from glmtune.switch.model import base_alone


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading some prompts left behind.

    Attributes:
        hidden_BSD: hidden states after the final norm, padded on the right; of the last tokens alone,
            ``[B, 1, D]``, unless those of all were asked for.
        layers: keys and values of the prompts' own tokens, padded on the right; empty where not kept.
        lengths: own tokens per prompt.
        positions: of the token that follows every prompt, and what each further one adds, int64
            ``[B, 2, T]``.
    """

    hidden_BSD: Tensor
    layers: Sequence[KeysValues]
    lengths: tuple[int, ...]
    positions: Tensor

    @property
    def last_hidden_BD(self) -> Tensor:
        """Hidden state of every prompt's last token."""
        if self.hidden_BSD.shape[1] == 1:
            return self.hidden_BSD[:, 0]
        rows = torch.arange(len(self.lengths), device=self.hidden_BSD.device)
        return self.hidden_BSD[rows, torch.tensor(self.lengths, device=rows.device) - 1]

    def layers_of(self, row: int) -> list[KeysValues]:
        """Return the keys and values of one row, each ``[1, K, S, H]``, without its padding; views."""
        length = self.lengths[row]
        return [
            (keys[row : row + 1, :, :length], values[row : row + 1, :, :length])
            for keys, values in self.layers
        ]


@dataclass(frozen=True, slots=True)
class Drafting:
    """A model that is to draft tokens, as it is handed to an engine.

    Attributes:
        model: a causal LM with the vocabulary of the one that answers.
        max_tokens: most tokens of a draft.
    """

    model: PreTrainedModel
    max_tokens: int


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A smaller model that drafts tokens for a larger one.

    Attributes:
        model: the smaller one.
        max_tokens: most tokens of a draft.
        cost: what a token of it costs, a token of the larger one being 1: by the bytes of their weights.
    """

    model: EngineModel
    max_tokens: int
    cost: float


class EngineModel:
    """A model for inference; weights, attached prefix and adapters are used as they are.

    Attributes:
        model: as it was given, wrapped by PEFT or not.
        base: the causal LM itself.
        config: of the base model.
        device: where the embedding lies, and head and final norm: tokens go in and scores come out there.
        layer_devices: where each layer lies, and so its keys and values; all the same but in a split model
            (`glmtune.models.placement`).
        dtype: of the hidden state.
        can_share: whether prompts that begin alike may be read as one, and a prompt in pieces; not with
            ChatGLM-6B, whose context is seen in both directions.
        draft_model: drafts tokens for it; None: none does.
    """

    draft_model: DraftModel | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a causal LM, wrapped by PEFT or not, and put it into evaluation mode."""
        model.eval()
        self.model = model
        self.base: Any = unwrapped(model)
        self.config = self.base.config
        self._stack = self.base.base_model
        weight = self.base.get_input_embeddings().weight
        self.device: torch.device = weight.device
        self.layer_devices = layer_devices(self.base)
        # Embeddings may be codes: the model says what their rows become.
        self.dtype: torch.dtype = weight.dtype if weight.is_floating_point() else self.base.dtype
        self._is_base_alone = False
        # Of architectures whose layers are known to be called as `last_tokens_only` says.
        self._last_layer: Any = self._stack.layers[-1] if isinstance(self.base, LaterModel) else None
        self.can_share = not isinstance(self.config, ChatGlmConfig)
        register_engine_attention()

    def use_drafts(self, given: Drafting) -> None:
        """Let a smaller model, in evaluation mode from now on, draft tokens.

        Raises:
            ConfigError: it has another vocabulary.
        """
        drafting = EngineModel(given.model)
        ours, its = self.config.vocab_size, drafting.config.vocab_size
        if ours != its:
            raise ConfigError(
                f"The model that drafts has {its:,} tokens, but the one that answers has {ours:,}, and"
                " a draft is in tokens of both. Use a smaller model of the release, or this one quantized."
            )
        self.draft_model = DraftModel(drafting, given.max_tokens, drafting.weight_bytes / self.weight_bytes)

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights and codes."""
        return sum(weight.nbytes for weight in self.base.parameters())

    def token_bytes(self, kv_cache: str) -> float:
        """Return what keys and values of a token take, those of a model that drafts included."""
        own = bytes_per_token(self.config, kv_cache, self.dtype)
        small = self.draft_model
        return own if small is None else own + small.model.token_bytes("plain")

    @contextmanager
    def base_alone(self) -> Generator[None]:
        """Compute without what is attached and has a switch, for the time of a block."""
        before, self._is_base_alone = self._is_base_alone, True
        try:
            yield
        finally:
            self._is_base_alone = before

    @torch.no_grad()
    def read(
        self, prompts: Sequence[TokenIds], before: Sequence[Before], *, keep: bool, every: bool = False
    ) -> Reading:
        """Read what follows tokens that were read already.

        Args:
            prompts: token ids without those that were read, none empty; ChatGLM-6B: whole prompts.
            before: what stands in front of each prompt, or a single one that stands in front of all.
            keep: whether to keep keys and values.
            every: whether the hidden state of every token is asked for, not of the last ones alone.
        """
        width, pad = max(map(len, prompts)), self.config.pad_token_id or 0
        # Padding stands behind a row: causal attention never looks there, so no mask is needed for it.
        rows = [[*prompt, *[pad] * (width - len(prompt))] for prompt in prompts]
        input_ids_BS = torch.tensor(rows, device=self.device)
        # Two more columns: what follows a prompt is numbered by the same rule as the prompt itself.
        # ChatGLM-6B steps from sop to the first token as it does nowhere else (March 2023: back to gMASK's
        # number), and evenly from there on, so two numbers tell all that come.
        behind = torch.full((len(rows), 2), pad, device=self.device)
        streams_BTS = self._positions(torch.cat([input_ids_BS, behind], dim=1), before)
        inputs = {"input_ids": input_ids_BS, "position_ids": streams_BTS[..., :width]}
        if every or self._last_layer is None or width == 1:
            states = ReadStates(before, keep=keep)
            hidden_BSD = self._forward(states, **inputs)
        else:
            sizes = [len(prompt) for prompt in prompts]
            last = self.config.num_hidden_layers - 1
            states = ReadStates(before, keep=keep, last_layer=last, lengths=sizes)
            with last_tokens_only(self._last_layer, sizes):
                hidden_BSD = self._forward(states, **inputs)
        streams_BTS = streams_BTS if streams_BTS.dim() == 3 else streams_BTS[:, None]
        streams_BTS = streams_BTS.expand(len(rows), -1, -1)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        columns_BT1 = lengths[:, None, None].expand(-1, streams_BTS.shape[1], 1)
        first, second = (streams_BTS.gather(2, columns_BT1 + offset)[..., 0] for offset in (0, 1))
        return Reading(
            hidden_BSD=hidden_BSD,
            layers=states.own,
            lengths=tuple(len(prompt) for prompt in prompts),
            positions=torch.stack((first, second - first), dim=1),
        )

    def read_shared(self, token_ids: TokenIds, parent: SharedPrompt) -> SharedPrompt:
        """Read a shared prompt, of which ``parent`` holds the first tokens already."""
        known = len(parent.token_ids)
        own = self.read([token_ids[known:]], [Before(parent.layers)], keep=True).layers
        return SharedPrompt(tuple(token_ids), joined(parent.layers, own))

    @torch.no_grad()
    def step(self, tokens: Sequence[Sequence[int]], positions: Tensor, states: BatchStates) -> Tensor:
        """Read one more token per place, or a few.

        The states are not advanced: the caller does so last, and a step that ran out of memory is repeated
        over what it wrote.

        Args:
            tokens: of every place of the batch, equally many.
            positions: of these tokens, int64 ``[B, T, Q]``.
            states: of the batch, mutated.

        Returns:
            Hidden state ``[B, Q, D]`` after the final norm.
        """
        mask = states.open_columns(len(tokens[0]))
        if self.can_share:
            positions = positions[:, 0]  # ChatGLM-6B alone has several positions per token
        input_ids_BQ = torch.tensor(tokens, device=self.device)
        return self._forward(states, input_ids=input_ids_BQ, position_ids=positions, attention_mask=mask)

    @torch.no_grad()
    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Return float32 logits ``[B, vocab]``.

        Raises:
            GlmtuneError: they are not finite; see `check_output`.
        """
        logits_BV = self.unchecked_logits(hidden_BD)
        check_output(self.model, logits_BV)
        return logits_BV

    @torch.no_grad()
    def unchecked_logits(self, hidden_BD: Tensor) -> Tensor:
        """Return float32 logits ``[B, vocab]`` whatever they are: one row's damage is no other's."""
        return self.base.get_output_embeddings()(hidden_BD).float()  # asked anew: a LoRA may replace it

    def _positions(self, input_ids_BS: Tensor, before: Sequence[Before]) -> Tensor:
        if not self.can_share:
            return token_positions(input_ids_BS, self.config)
        starts_B1 = torch.tensor([[each.num_tokens] for each in before], device=self.device)
        return starts_B1 + torch.arange(input_ids_BS.shape[1], device=self.device)

    def _forward(self, states: AttentionStates, **inputs: Any) -> Tensor:
        if self._is_base_alone:
            inputs |= base_alone(self.base, len(inputs["input_ids"]))
        with _attention(self.config, ENGINE_ATTENTION):
            return self._stack(**inputs, use_cache=False, engine_states=states).last_hidden_state


@torch.no_grad()
def joined(first: Sequence[KeysValues], second: Sequence[KeysValues]) -> tuple[KeysValues, ...]:
    """Put the keys and values of more tokens behind those of others, layer by layer."""
    if not first:
        return tuple(second)
    return tuple(
        (torch.cat([old[0], new[0]], dim=2), torch.cat([old[1], new[1]], dim=2))
        for old, new in zip(first, second, strict=True)
    )


@contextmanager
def _attention(config: Any, name: str) -> Generator[None]:
    """Run a forward pass with another attention implementation; the user's model keeps its own."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
