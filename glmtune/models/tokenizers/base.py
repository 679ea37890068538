"""What every tokenizer of the family does alike: left padding, position ids, and prompts by our renderer.

Two methods of transformers 5 are overridden here: `apply_chat_template`, the public way to a prompt, and
`_pad`, which `pad` and ``tokenizer(...)`` call once per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils.generic import PaddingStrategy

from glmtune.models.releases.families import Family
from glmtune.models.templates.chat_messages import (
    ChatConversation,
    Tool,
    chat_batch,
    chat_messages,
    encode_chat,
    encoding_settings,
    render_chat,
    spread_masks,
)


class GlmTokenizer(PreTrainedTokenizer, ABC):
    """A transformers tokenizer of a GLM.

    Rows are padded on the left unless told otherwise; position ids are 0 on padding and count the real
    tokens. Take ``position_ids`` out of ``model_input_names`` where they are not wanted.

    Attributes:
        family: the release whose rules the tokenizer follows.
    """

    family: Family
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask", "position_ids"]  # pyright: ignore[reportIncompatibleVariableOverride]
    padding_side: str = "left"

    @property
    @abstractmethod
    def prefix_ids(self) -> list[int]:
        """The ids every input starts with."""

    @property
    def suffix_ids(self) -> list[int]:
        """The ids every input ends with."""
        return []

    @property
    @abstractmethod
    def end_id(self) -> int:
        """The id that ends an answer."""

    @abstractmethod
    def text_ids(self, text: str) -> list[int]:
        """Encode a text alone: no ids in front, no command token recognised."""

    @abstractmethod
    def get_command(self, token: str) -> int:
        """Return the id of a command token such as ``[gMASK]``."""

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        conversation: ChatConversation | Sequence[ChatConversation],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | list[int] | list[list[int]] | BatchEncoding:
        """Render or encode conversations with the family's template; a Jinja template is never used.

        Args:
            conversation: messages (ours, or dictionaries with ``role`` and ``content``), or a batch of such.
            tools: announced in the system message (ChatGLM3, GLM-4).
            add_generation_prompt: end with the prompt for an answer.
            continue_final_message: leave the last answer open, without the id that ends it.
            tokenize: return ids rather than text. The ids hold what text cannot: ``[gMASK] sop`` in front
                and, behind a last answer, the id that ends it.
            return_dict: return ids with attention mask and position ids.
            return_assistant_tokens_mask: add ``assistant_masks``, 1 where the model wrote the token.
            tokenizer_kwargs: more settings for the encoding.
            kwargs: ``padding``, ``truncation``, ``max_length`` and ``return_tensors`` as for every tokenizer.

        Raises:
            DataError: the messages do not fit the template.
            ConfigError: a setting that our renderer cannot obey, such as ``chat_template``.
        """
        settings = encoding_settings({**kwargs, **(tokenizer_kwargs or {})})
        batch, batched = chat_batch(conversation)
        chats = [chat_messages(self, chat, tools) for chat in batch]
        if not tokenize:
            texts = [render_chat(self, chat, generation_prompt=add_generation_prompt) for chat in chats]
            return texts if batched else texts[0]
        encoded = [
            encode_chat(
                self,
                chat,
                generation_prompt=add_generation_prompt,
                continue_final=continue_final_message,
                assistant_mask=return_assistant_tokens_mask,
            )
            for chat in chats
        ]
        # Once more through `__call__`, now with ids: it pads, truncates and makes tensors like any input.
        ids: Any = [chat.input_ids for chat in encoded]
        out = self(ids if batched else ids[0], add_special_tokens=False, **settings)
        if return_assistant_tokens_mask:
            tensors = settings.get("return_tensors")
            attention = out["attention_mask"] if batched or tensors else [out["attention_mask"]]
            masks = spread_masks(encoded, attention, keep_start=self.truncation_side == "right")
            out["assistant_masks"] = masks if batched or tensors else masks[0]
            out.convert_to_tensors(tensors)
        return out if return_dict else out["input_ids"]

    def build_chat_input(
        self, query: str, history: Sequence[Any] | None = None, role: str = "user"
    ) -> BatchEncoding:
        """Encode a question as the method of this name of ChatGLM3's and GLM-4's tokenizers does.

        Args:
            query: the question, or a tool's result.
            history: earlier turns, as `model.chat` returned them.
            role: who speaks.

        Returns:
            Tensors ``[1, S]`` for ``model.generate(**inputs)``.

        Raises:
            DataError: the history does not fit the release.
        """
        asked: Any = _chat(query, history, role)
        found = self.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
        assert isinstance(found, BatchEncoding)
        return found

    def build_prompt(self, query: str, history: Sequence[Any] | None = None) -> str:
        """Render a question as the method of this name of ChatGLM2's tokenizer does.

        Args:
            query: the question.
            history: see `build_chat_input`.
        """
        asked: Any = _chat(query, history, "user")
        return str(self.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        # Positions are counted before the parent pads: behind it, padding and tokens look alike where the
        # caller asked for no attention mask.
        ids = encoded_inputs[self.model_input_names[0]]
        positions = encoded_inputs.get("position_ids")
        if positions is None and "position_ids" in self.model_input_names:
            positions = _positions(encoded_inputs.get("attention_mask"), len(ids))
        padded = super()._pad(
            encoded_inputs,
            max_length,
            padding_strategy,
            pad_to_multiple_of,
            padding_side,
            return_attention_mask,
        )
        if positions is not None:
            padding = [0] * (len(padded[self.model_input_names[0]]) - len(positions))
            right = (padding_side or self.padding_side) == "right"
            padded["position_ids"] = [*positions, *padding] if right else [*padding, *positions]
        return padded


def _chat(query: str, history: Sequence[Any] | None, role: str) -> list[Any]:
    """Return messages; turns are messages already, or pairs of question and answer."""
    messages: list[Any] = []
    for turn in history or ():
        if isinstance(turn, tuple | list) and len(turn) == 2:
            asked, answered = turn
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        else:
            messages.append(turn)
    return [*messages, {"role": role, "content": query}]


def _positions(attention_mask: Sequence[int] | None, length: int) -> list[int]:
    """Count the real tokens from 0; padding that is already there gets 0."""
    if attention_mask is None:
        return list(range(length))
    positions, seen = [], 0
    for real in attention_mask:
        positions.append(seen if real else 0)
        seen += bool(real)
    return positions
