"""`model.chat` and `model.stream_chat` as the READMEs of the releases show them, for every generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from glmtune.errors import ConfigError, DataError
from glmtune.messages import Message
from glmtune.models.architectures.compiling import compiled_generation
from glmtune.models.architectures.kv_cache import Int8Cache
from glmtune.models.chat.defaults import CHAT_DEFAULTS
from glmtune.models.chat.held import check_not_held
from glmtune.models.chat.stream import (
    PREFILL_CHUNK_TOKENS,
    SAFE_TOKEN,
    ConversationCache,
    RepairScores,
    StopStrings,
    prompt_inputs,
    stream_tokens,
)
from glmtune.models.releases.families import Family
from glmtune.models.settings import KV_CACHES
from glmtune.models.templates.base import Template, TextTokenizer
from glmtune.models.templates.chat_messages import THOUGHTS_KEY, chat_messages
from glmtune.models.templates.renderer import template_for
from glmtune.models.templates.responses import process_response
from glmtune.settings import check_choice
from glmtune.switch.model import generation_keywords, switch_of

# What a chat decides itself; handed in, it would be overwritten or change what comes back.
_DECIDED = ("eos_token_id", "pad_token_id", "num_return_sequences", "return_dict_in_generate", "streamer")
# What a chat leaves as it is where nobody says otherwise: `generate` would take the values of the release's
# generation_config.json, which the releases' own `chat` does not read.
_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}
_INCOMPLETE = "\ufffd"
"""How decoding shows the first bytes of a character whose other bytes are still to come."""

ChatResponse = str | dict[str, Any]
"""An answer: text, or a tool call with ``name`` and ``parameters`` (``content`` where unreadable)."""


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A question within its conversation.

    Attributes:
        tokenizer: decides the release.
        history: earlier turns in the form of the release.
        query: the question, or a tool's result.
        role: who speaks.
        system: text of a system message in front of everything; None: what the history has.
    """

    tokenizer: PreTrainedTokenizerBase
    history: Sequence[Any]
    query: str
    role: str
    system: str | None = None

    def __post_init__(self) -> None:
        """Refuse what would stand in the prompt as the word ``None``, and two system messages.

        Raises:
            DataError: the question is no text; there are two system messages.
        """
        _check_text(self.query, "The question")
        if self.system is not None:
            _check_text(self.system, "`system`")
            if self.history and _role(self.history[0]) == "system":
                raise DataError(
                    "`system` is given, but the history begins with a system message already. Give one."
                )

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
        items: list[Any] = []
        for place, turn in enumerate(self.history, start=1):
            items += self._turn(turn, place)
        before = [Message("system", self.system)] if self.system is not None else []
        return chat_messages(self.text_tokenizer, [*before, *items, Message(self.role, self.query)])

    def _turn(self, turn: Any, place: int) -> list[Any]:
        """Return the messages of a turn of the history: a message, or a pair of question and answer."""
        if isinstance(turn, Mapping | Message):
            return [turn]
        # A release takes what its `chat` gives back; another form is the history of another release.
        gives_pairs = not self.template.knows_tools or self.family is Family.TRANSFORMERS
        if not gives_pairs or isinstance(turn, str) or len(turn) != 2:
            form = "messages" if not gives_pairs else "(query, response) pairs or of messages"
            raise DataError(
                f"Turn {place} of the history is {str(turn)[:60]!r}, but the history of `{self.family}` "
                f"is a list of {form}. Pass back the history that `chat` returned."
            )
        for text, who in zip(turn, ("question", "answer"), strict=True):
            _check_text(text, f"The {who} in turn {place} of the history")
        return [Message("user", turn[0]), Message("assistant", turn[1])]

    def decode(self, answer_ids: Sequence[int]) -> str:
        """Return what the model wrote as text, with the role names that separate its messages."""
        special = not self.template.knows_tools
        return str(self.tokenizer.decode(list(answer_ids), skip_special_tokens=special))

    def answered(self, text: str) -> tuple[ChatResponse, list[Any]]:
        """Return the response and the history with this turn.

        Args:
            text: from `decode`.
        """
        first = self.history[0] if self.history else None
        tools = bool(first.get("tools") if isinstance(first, Mapping) else getattr(first, "tools", ""))
        opening = self.template.answer_opening
        response = process_response(self.family, f"{opening}{text}", tools_announced=tools)
        if not self.template.knows_tools and self.family is not Family.TRANSFORMERS:
            return response.content, [*self.history, (self.query, response.content)]
        written = [
            {"role": message.role, "metadata": message.metadata, "content": message.content}
            for message in response.messages
        ]
        if response.thoughts:
            written[0][THOUGHTS_KEY] = response.thoughts
        return response.content, [*self.history, {"role": self.role, "content": self.query}, *written]


def _check_text(value: object, what: str) -> None:
    """Raise DataError unless a value is text: `None` would stand in the prompt as that word."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {value!r:.60}, but it must be text. Give a string.")


def _role(turn: object) -> object:
    return turn.get("role") if isinstance(turn, Mapping) else getattr(turn, "role", None)


class ChatMixin:
    """The chat interface of the releases on a causal LM.

    Both methods take as further ``settings`` what ``generate`` takes. Where nothing is given they follow the
    release: ``max_length`` (prompt and answer together, tokens) 8,192, or 2,048 for ChatGLM-6B and 32,768 for
    the 32K releases, and never beyond the model's context; ``do_sample`` True with ``top_p`` 0.8 and
    ``temperature`` 0.8, or 0.7 and 0.95 for ChatGLM-6B; a ``temperature`` of 0 takes the likeliest token. An
    answer that ends at one of ``stop_strings`` keeps
    it, as in ``generate``. Put the model in evaluation mode first.

    A model that thinks first (a folder in transformers' format whose prompts or answers open ``<think>``)
    answers without its thoughts; they stand beside the answer in the history, as ``reasoning_content``, where
    the folder's template decides whether a later turn shows them.

    A prefix or LoRA with a switch decides at every question whether it applies; ``use_switch=False`` applies
    it to all.
    """

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[Any] | None = None,
        *,
        role: str = "user",
        system: str | None = None,
        kv_cache: str = "plain",
        compile: bool = False,
        prefix_strength: float | None = None,
        **settings: Any,
    ) -> tuple[ChatResponse, list[Any]]:
        """Answer a question.

        Args:
            tokenizer: of this model, one of ours.
            query: the question, or a tool's result with ``role="observation"``.
            history: earlier turns, oldest first, as this method returned them; left as it is. ChatGLM3 and
                GLM-4 take message dictionaries with ``role``, ``content`` and, if any, ``metadata``; a first
                system message may carry ``tools``. The others take (query, response) pairs; a folder in
                transformers' format takes both and returns messages.
            role: who speaks; anything but ``user`` needs a release with roles.
            system: text of a system message in front of everything, rendered as training renders one. The
                history that comes back does not hold it: give it at every turn, or put a message of the role
                ``system`` in front of the history.
            kv_cache: ``int8`` keeps the keys and values of earlier tokens as codes, in half the memory of
                half precision, at a small error; ``plain`` as they are.
            compile: decode with code made by `torch.compile`, see `compiled_generation`: the first answer
                waits for it. Memory for all of ``max_length`` is taken and attended to: keep it short.
            prefix_strength: how much the attached prefix counts: 1 as it was trained, 0 not at all, what lies
                between and beyond by log strength on the scores of its columns; None: as in `load_model`.
            **settings: see the class; ``num_beams`` too.

        Returns:
            The response and the history with this turn.

        Raises:
            ConfigError: the prompt leaves no room for an answer; no such ``kv_cache``; there is nothing to
                compile with, or a cache that ``compile`` cannot use; an engine runs the model.
            DataError: the history or the role does not fit the release.
        """
        model = cast("Any", self)
        check_not_held(model, "model.chat")
        turn = ChatTurn(tokenizer, history or (), query, role, system)
        prompt_ids = turn.template.encode_prompt(turn.text_tokenizer, turn.messages())
        check_choice("kv_cache", kv_cache, KV_CACHES)
        if kv_cache == "int8":
            settings = {"past_key_values": Int8Cache(), **settings}
        if compile:
            _check_compiled(kv_cache, settings)
            settings = {**compiled_generation(model.device), **settings}
        settings["prefix_strength"] = prefix_strength
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
        system: str | None = None,
        past_key_values: ConversationCache | None = None,
        return_past_key_values: bool = False,
        kv_cache: str = "plain",
        prefix_strength: float | None = None,
        **settings: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Answer a question and hand out the answer as it grows; a consumer that stops, stops the model.

        Args:
            tokenizer: as for `chat`.
            query: as for `chat`.
            history: as for `chat`.
            role: as for `chat`.
            system: as for `chat`.
            past_key_values: cache of the earlier turns; then only the new text is encoded and read. It holds
                the answers token by token as they were written, where a prompt without it encodes their
                text. It is left as it is, so several turns can go on from it.
            return_past_key_values: hand out the cache too.
            kv_cache: as for `chat`; a cache that was handed out decides for itself.
            prefix_strength: as for `chat`; a cache goes on with the strength that it was begun with.
            **settings: see the class.

        Yields:
            The response so far and the history with it (and the cache) after every token, once there is text
            and while its last character is complete. The cache of a turn grows until the turn ends.

        Raises:
            ConfigError: as for `chat`; beams; a cache where there can be none.
            DataError: as for `chat`.
        """
        model = cast("Any", self)
        check_not_held(model, "model.stream_chat")
        turn = ChatTurn(tokenizer, history or (), query, role, system)
        _check_streaming(turn, past_key_values, return_past_key_values, settings)
        settings.pop("compile", None)
        check_choice("kv_cache", kv_cache, KV_CACHES)
        if past_key_values is None:
            of_model: float = getattr(model.base_model, "prefix_strength", 1.0)
            cache = ConversationCache(kv_cache, of_model if prefix_strength is None else prefix_strength)
            cache.token_ids = turn.template.encode_prompt(turn.text_tokenizer, turn.messages())
        else:
            if kv_cache not in ("plain", past_key_values.kv_cache):
                raise ConfigError(
                    f"`kv_cache` is `{kv_cache}`, but `past_key_values` holds a conversation that was begun "
                    f"with `{past_key_values.kv_cache}`. Leave `kv_cache` out, or the cache."
                )
            if prefix_strength not in (None, past_key_values.prefix_strength):
                raise ConfigError(
                    f"`prefix_strength` is {prefix_strength}, but `past_key_values` holds a conversation "
                    f"that was read with {past_key_values.prefix_strength}. Leave it out, or the cache."
                )
            cache = past_key_values.fork()
            cache.token_ids += turn.template.encode_continuation(turn.text_tokenizer, turn.messages())
            settings = {"prefill_chunk_size": PREFILL_CHUNK_TOKENS, **settings}
        prompt_length = len(cache.token_ids)
        settings["prefix_strength"] = cache.prefix_strength
        cache, settings = _decided(model, cache, settings)
        given = generate_settings(model, turn, prompt_length, settings)
        for token, finished in stream_tokens(model, cache.token_ids, cache=cache, **given):
            check_not_held(model, "model.stream_chat")  # an engine may have begun since the last token
            if token not in turn.stop_ids:
                cache.token_ids.append(token)
            text = turn.decode(cache.token_ids[prompt_length:])
            if finished or (text and not text.endswith(_INCOMPLETE)):
                answered = turn.answered(text)
                yield (*answered, cache) if return_past_key_values else answered


def _decided(
    model: Any, cache: ConversationCache, settings: dict[str, Any]
) -> tuple[ConversationCache, dict[str, Any]]:
    """Let a switch decide for a conversation; return the cache and what `generate` is told besides.

    A cache that was read under the other decision holds other keys and values: all is read anew then.
    """
    ids = torch.tensor([cache.token_ids], device=model.device)
    use_switch, strength = settings.pop("use_switch", None), settings.get("prefix_strength")
    switch = switch_of(model)
    told = generation_keywords(model, ids, {"prefix_strength": strength}, use_switch=use_switch)
    is_tuned = None if switch is None or use_switch is False or strength == 0 else not told
    if cache.is_tuned != is_tuned and cache.get_seq_length():
        fresh = ConversationCache(cache.kv_cache, cache.prefix_strength)
        fresh.token_ids, cache = cache.token_ids, fresh
    cache.is_tuned = is_tuned
    # Decided once: `generate` is not to read the conversation for it again.
    return cache, {**settings, **told, "use_switch": False}


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
    if settings.get("temperature") == 0:
        # The limit of sampling at ever lower temperatures; a division by it would be none.
        settings = {**settings, "do_sample": False}
        settings.pop("temperature")
    if settings["do_sample"]:
        settings = {"top_p": defaults.top_p, "temperature": defaults.temperature, **settings}
    release = getattr(model, "generation_config", None)
    settings = {n: v for n, v in _NEUTRAL.items() if getattr(release, n, None) is not None} | settings
    if "max_new_tokens" not in settings:
        context = model.config.max_position_embeddings
        settings.setdefault("max_length", min(defaults.max_length, context))
        if prompt_length >= settings["max_length"]:
            raise ConfigError(
                f"`max_length` is {settings['max_length']} tokens, but the conversation has {prompt_length} "
                f"already, which leaves no room for an answer; the model's context is {context} tokens. "
                "Raise `max_length`, or drop the oldest turns of the history."
            )
    stops = list(settings.pop("stopping_criteria", ()))
    texts = settings.pop("stop_strings", None)
    if texts:
        texts = [texts] if isinstance(texts, str) else list(texts)
        stops.append(StopStrings(texts, turn.decode, prompt_length))
    image_tokens: int = getattr(turn.tokenizer, "num_image_tokens", 0)  # ids in front of the text's
    processors = [*settings.pop("logits_processor", ()), RepairScores(SAFE_TOKEN + image_tokens)]
    return settings | {
        "logits_processor": LogitsProcessorList(processors),
        "eos_token_id": list(turn.stop_ids),
        "stopping_criteria": StoppingCriteriaList(stops),
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
