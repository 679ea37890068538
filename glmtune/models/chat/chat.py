"""`model.chat` and `model.stream_chat` as the READMEs of the releases show them, for every generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from glmtune.errors import ConfigError, DataError
from glmtune.messages import Message
from glmtune.models.architectures.compiling import compiled_generation
from glmtune.models.architectures.kv_cache import Int8Cache
from glmtune.models.chat.stream import (
    PREFILL_CHUNK_TOKENS,
    SAFE_TOKEN,
    ConversationCache,
    RepairScores,
    prompt_inputs,
    stream_tokens,
)
from glmtune.models.releases.families import Family
from glmtune.models.settings import KV_CACHES
from glmtune.models.templates.base import Template, TextTokenizer
from glmtune.models.templates.chat_messages import chat_messages
from glmtune.models.templates.renderer import template_for
from glmtune.models.templates.responses import process_response
from glmtune.settings import check_choice

# What a chat decides itself; handed in, it would be overwritten or change what comes back.
_DECIDED = ("eos_token_id", "pad_token_id", "num_return_sequences", "return_dict_in_generate", "streamer")
_INCOMPLETE = "\ufffd"
"""How decoding shows the first bytes of a character whose other bytes are still to come."""

ChatResponse = str | dict[str, Any]
"""An answer: text, or a tool call with ``name`` and ``parameters`` (``content`` where unreadable)."""


@dataclass(frozen=True, slots=True)
class ChatDefaults:
    """What the `chat` of a release does where its caller says nothing.

    Attributes:
        max_length: prompt and answer together, tokens; never beyond the model's context.
        top_p: keep the likeliest tokens up to this sum.
        temperature: divides the logits.
    """

    max_length: int = 8192
    top_p: float = 0.8
    temperature: float = 0.8


# Numbers from the signatures of `chat` in the released modeling files; the long-context releases allow 32768.
_LATER, _LONG = ChatDefaults(), ChatDefaults(max_length=32768)
CHAT_DEFAULTS: dict[Family, ChatDefaults] = {
    Family.CHATGLM: ChatDefaults(max_length=2048, top_p=0.7, temperature=0.95),
    Family.CHATGLM2: _LATER,
    Family.CHATGLM2_32K: _LONG,
    Family.CODEGEEX2: _LATER,
    Family.CHATGLM3: _LATER,
    Family.CHATGLM3_32K: _LONG,
    Family.GLM4: _LATER,
}


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A question within its conversation.

    Attributes:
        tokenizer: decides the release.
        history: earlier turns in the form of the release.
        query: the question, or a tool's result.
        role: who speaks.
    """

    tokenizer: PreTrainedTokenizerBase
    history: Sequence[Any]
    query: str
    role: str

    @property
    def family(self) -> Family:
        """The release."""
        return self.text_tokenizer.family

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer as templates see it."""
        return cast("TextTokenizer", self.tokenizer)

    @property
    def template(self) -> Template:
        """The prompt rules of the release."""
        return template_for(self.text_tokenizer)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.template.stop_ids(self.text_tokenizer)

    def messages(self) -> list[Message]:
        """Return the conversation as messages, the question last.

        Raises:
            DataError: the history has another form than the release's.
        """
        if self.template.knows_tools:
            return chat_messages(
                self.text_tokenizer, [*self.history, {"role": self.role, "content": self.query}]
            )
        messages: list[Message] = []
        for place, turn in enumerate(self.history, start=1):
            if isinstance(turn, Mapping | str) or len(turn) != 2:
                raise DataError(
                    f"Turn {place} of the history is {str(turn)[:60]!r}, but the history of `{self.family}` "
                    "is a list of (query, response) pairs. Pass back the history that `chat` returned."
                )
            messages += [Message("user", turn[0]), Message("assistant", turn[1])]
        return [*messages, Message(self.role, self.query)]

    def decode(self, answer_ids: Sequence[int]) -> str:
        """Return what the model wrote as text, with the role names that separate its messages."""
        special = not self.template.knows_tools
        return str(self.tokenizer.decode(list(answer_ids), skip_special_tokens=special))

    def answered(self, text: str) -> tuple[ChatResponse, list[Any]]:
        """Return the response and the history with this turn.

        Args:
            text: from `decode`.
        """
        tools = bool(self.history) and isinstance(self.history[0], Mapping) and "tools" in self.history[0]
        response = process_response(self.family, text, tools_announced=tools)
        if not self.template.knows_tools:
            return response.content, [*self.history, (self.query, response.content)]
        written = [
            {"role": message.role, "metadata": message.metadata, "content": message.content}
            for message in response.messages
        ]
        return response.content, [*self.history, {"role": self.role, "content": self.query}, *written]


class ChatMixin:
    """The chat interface of the releases on a causal LM.

    Both methods take as further ``settings`` what ``generate`` takes. Where nothing is given they follow the
    release: ``max_length`` (prompt and answer together, tokens) 8,192, or 2,048 for ChatGLM-6B and 32,768 for
    the 32K releases, and never beyond the model's context; ``do_sample`` True with ``top_p`` 0.8 and
    ``temperature`` 0.8, or 0.7 and 0.95 for ChatGLM-6B. Put the model in evaluation mode first.
    """

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[Any] | None = None,
        *,
        role: str = "user",
        kv_cache: str = "plain",
        compile: bool = False,
        **settings: Any,
    ) -> tuple[ChatResponse, list[Any]]:
        """Answer a question.

        Args:
            tokenizer: of this model, one of ours.
            query: the question, or a tool's result with ``role="observation"``.
            history: earlier turns, oldest first, as this method returned them; left as it is. ChatGLM3 and
                GLM-4 take message dictionaries with ``role``, ``content`` and, if any, ``metadata``; a first
                system message may carry ``tools``. The others take (query, response) pairs.
            role: who speaks; anything but ``user`` needs a release with roles.
            kv_cache: ``int8`` keeps the keys and values of earlier tokens as codes, in half the memory of
                half precision, at a small error; ``plain`` as they are.
            compile: decode with code made by `torch.compile`, see `compiled_generation`: the first answer
                waits for it. Memory for all of ``max_length`` is taken and attended to: keep it short.
            **settings: see the class; ``num_beams`` too.

        Returns:
            The response and the history with this turn.

        Raises:
            ConfigError: the prompt leaves no room for an answer; no such ``kv_cache``; there is nothing to
                compile with, or a cache that ``compile`` cannot use.
            DataError: the history or the role does not fit the release.
        """
        model = cast("Any", self)
        turn = ChatTurn(tokenizer, history or (), query, role)
        prompt_ids = turn.template.encode_prompt(turn.text_tokenizer, turn.messages())
        check_choice("kv_cache", kv_cache, KV_CACHES)
        if kv_cache == "int8":
            settings = {"past_key_values": Int8Cache(), **settings}
        if compile:
            _check_compiled(kv_cache, settings)
            settings = {**compiled_generation(model.device), **settings}
        given = generate_settings(model, turn, len(prompt_ids), settings)
        sequence_1T = model.generate(**prompt_inputs(model, prompt_ids), **given)
        answer_ids = sequence_1T[0, len(prompt_ids) :].tolist()
        if answer_ids[-1] in turn.stop_ids:
            answer_ids.pop()
        return turn.answered(turn.decode(answer_ids))

    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[Any] | None = None,
        *,
        role: str = "user",
        past_key_values: ConversationCache | None = None,
        return_past_key_values: bool = False,
        kv_cache: str = "plain",
        **settings: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Answer a question and hand out the answer as it grows; a consumer that stops, stops the model.

        Args:
            tokenizer: as for `chat`.
            query: as for `chat`.
            history: as for `chat`.
            role: as for `chat`.
            past_key_values: cache of the earlier turns; then only the new text is encoded and read. It holds
                the answers token by token as they were written, where a prompt without it encodes their
                text. It is left as it is, so several turns can go on from it.
            return_past_key_values: hand out the cache too.
            kv_cache: as for `chat`; a cache that was handed out decides for itself.
            **settings: see the class.

        Yields:
            The response so far and the history with it (and the cache) after every token, once there is text
            and while its last character is complete. The cache of a turn grows until the turn ends.

        Raises:
            ConfigError: as for `chat`; beams; a cache where there can be none.
            DataError: as for `chat`.
        """
        model = cast("Any", self)
        turn = ChatTurn(tokenizer, history or (), query, role)
        _check_streaming(turn, past_key_values, return_past_key_values, settings)
        settings.pop("compile", None)
        check_choice("kv_cache", kv_cache, KV_CACHES)
        if past_key_values is None:
            cache = ConversationCache(kv_cache)
            cache.token_ids = turn.template.encode_prompt(turn.text_tokenizer, turn.messages())
        else:
            if kv_cache not in ("plain", past_key_values.kv_cache):
                raise ConfigError(
                    f"`kv_cache` is `{kv_cache}`, but `past_key_values` holds a conversation that was begun "
                    f"with `{past_key_values.kv_cache}`. Leave `kv_cache` out, or the cache."
                )
            cache = past_key_values.fork()
            cache.token_ids += turn.template.encode_continuation(turn.text_tokenizer, turn.messages())
            settings = {"prefill_chunk_size": PREFILL_CHUNK_TOKENS, **settings}
        prompt_length = len(cache.token_ids)
        given = generate_settings(model, turn, prompt_length, settings)
        for token, finished in stream_tokens(model, cache.token_ids, cache=cache, **given):
            if token not in turn.stop_ids:
                cache.token_ids.append(token)
            text = turn.decode(cache.token_ids[prompt_length:])
            if finished or (text and not text.endswith(_INCOMPLETE)):
                answered = turn.answered(text)
                yield (*answered, cache) if return_past_key_values else answered


def generate_settings(
    model: Any, turn: ChatTurn, prompt_length: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what `generate` is told: the caller's settings, the release's where they say nothing.

    Args:
        model: a causal LM.
        turn: the question.
        prompt_length: tokens of the whole conversation before the answer.
        given: by the caller; None counts as nothing.

    Raises:
        ConfigError: a setting that a chat decides itself, or no room for an answer.
    """
    # Sampling settings fall back on the release's only while sampling: `generate` would warn of them
    # otherwise.
    defaults = CHAT_DEFAULTS[turn.family]
    settings: dict[str, Any] = {"do_sample": True, "num_beams": 1}
    settings |= {name: value for name, value in given.items() if value is not None}
    own = [name for name in _DECIDED if name in settings]
    if own:
        raise ConfigError(
            f"`chat` got {own[0]}={str(settings[own[0]])[:60]!r}, but it gives one answer, as text, and ends "
            f"it where `{turn.family}` does. Drop the argument, or use `model.generate`."
        )
    if settings["do_sample"]:
        settings = {"top_p": defaults.top_p, "temperature": defaults.temperature, **settings}
    if "max_new_tokens" not in settings:
        context = model.config.max_position_embeddings
        settings.setdefault("max_length", min(defaults.max_length, context))
        if prompt_length >= settings["max_length"]:
            raise ConfigError(
                f"`max_length` is {settings['max_length']} tokens, but the conversation has {prompt_length} "
                f"already, which leaves no room for an answer; the model's context is {context} tokens. "
                "Raise `max_length`, or drop the oldest turns of the history."
            )
    image_tokens: int = getattr(turn.tokenizer, "num_image_tokens", 0)  # ids in front of the text's
    processors = [*settings.pop("logits_processor", ()), RepairScores(SAFE_TOKEN + image_tokens)]
    return settings | {
        "logits_processor": LogitsProcessorList(processors),
        "eos_token_id": list(turn.stop_ids),
        "pad_token_id": turn.tokenizer.pad_token_id,
    }


def _check_compiled(kv_cache: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a cache that compiled decoding cannot use."""
    given = [
        name
        for name in ("past_key_values", "cache", "cache_implementation")
        if settings.get(name) is not None
    ]
    if kv_cache != "plain" or given:
        wrong = f"kv_cache={kv_cache!r}" if kv_cache != "plain" else f"`{given[0]}`"
        raise ConfigError(
            f"`chat` got compile=True and {wrong}, but compiled decoding needs a cache of fixed size, in the "
            "model's type, which it makes itself. Leave one of them out."
        )


def _check_streaming(
    turn: ChatTurn, cache: ConversationCache | None, return_cache: bool, settings: Mapping[str, Any]
) -> None:
    """Raise ConfigError for what cannot be streamed, and for a cache that nothing can go on from."""
    if settings.get("compile"):
        raise ConfigError(
            "`stream_chat` got compile=True, but its cache grows with the conversation, and compiled "
            "decoding needs one of fixed size. Use `chat(..., compile=True)`, or call "
            "`glmtune.models.architectures.compiling.compile_parts(model)` once: it compiles norms and MLPs."
        )
    if (settings.get("num_beams") or 1) != 1:
        raise ConfigError(
            f"`stream_chat` got num_beams={settings['num_beams']}, but the words of a beam search are known "
            "only at its end. Leave it at 1, or use `chat`."
        )
    if turn.family == Family.CHATGLM and (cache is not None or return_cache):
        raise ConfigError(
            "`stream_chat` of `chatglm` was asked for `past_key_values`, but in ChatGLM-6B every token of "
            "the prompt sees all others, so a new turn changes what a cache would hold. Leave out "
            "`past_key_values` and `return_past_key_values`."
        )
    if cache is None:
        return
    if not isinstance(cache, ConversationCache):
        raise ConfigError(
            f"`past_key_values` is a {type(cache).__name__}, but `stream_chat` goes on only from a cache "
            "that knows its tokens. Pass the one that `stream_chat(..., return_past_key_values=True)` gave."
        )
    if not turn.history:
        raise ConfigError(
            f"`past_key_values` holds {len(cache.token_ids)} tokens, but `history` is empty. Pass the "
            "history that came with the cache, or leave out the cache to start anew."
        )
