"""The chat template of a folder in transformers' format, with every answer found exactly in what it renders.

`marked.py` says which part of a rendered text is whose; a template for which that is not known is refused by
name. So names of special tokens count where the template wrote them and are plain text where a user did, and
an answer's tokens are those that the model itself will write: what follows the prompt that the template ends
with an answer asked for.

What a template does with answers is found out by rendering a few probes, when it is first used.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.models.templates.base import TextTokenizer, check_last, check_roles
from glmtune.models.templates.marked import (
    HIDDEN,
    Piece,
    as_item,
    hidden_name,
    marked,
    names_pattern,
    pieces_of,
    rendered,
)
from glmtune.models.templates.thinking import CLOSE, OPEN, opens_thoughts, split_thoughts, thoughts_and_rest
from glmtune.models.templates.tool_calls import described

_TURN_ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")
"""Special tokens at which GLM's answers end, where the vocabulary has them; beside the end token."""
_PROBE = ("1", "2", "3", "4", "5")
_TOOL_NAME = "probe_of_tools"
_TOOL = {
    "name": _TOOL_NAME,
    "description": "6",
    "parameters": {"type": "object", "properties": {"7": {"type": "string", "description": "8"}}},
}
_RESULT_ROLES = ("observation", "tool")


class _ToolForm(NamedTuple):
    """How a template takes tools: as the variable ``tools`` or in a message, in OpenAI's form or bare."""

    in_message: bool
    is_wrapped: bool


class _Answer(NamedTuple):
    """What the model is to write, and what the template writes behind it."""

    written: list[Piece]
    behind: list[Piece]


class FolderTemplate:
    """Renders with the Jinja template of a checkpoint's folder.

    Attributes:
        source: the template; None where the folder has none, so that only plain text can be continued.
        opens_thoughts: the prompt for an answer ends with ``<think>``.
        keeps_earlier_answers: an earlier answer reads as it was written, thoughts included.
        one_row_per_conversation: it is the same tokens, too: one row can hold all.
        knows_tools: the template shows tools.
    """

    name: ClassVar[str] = "transformers"
    tools_introduction: ClassVar[str] = ""
    bidirectional_context: ClassVar[bool] = False

    def __init__(
        self, source: str | None, names: Sequence[str] = (), named: Mapping[str, str] | None = None
    ) -> None:
        """Take a template; it is rendered a few times, to see how it treats answers.

        Args:
            source: Jinja.
            names: of the special tokens of the vocabulary.
            named: those with a usual name (``eos_token``), which templates can write.
        """
        self.source = source
        self._names, self._named, self._pattern = tuple(names), dict(named or {}), names_pattern(names)
        self._hidden = names_pattern([hidden_name(name) for name in names])
        self._tool_form: _ToolForm | None = None
        self._result_role = _RESULT_ROLES[0]
        self._always_asked = ""
        self.opens_thoughts = self.keeps_earlier_answers = self.one_row_per_conversation = False
        if source is not None:
            self._look()
        self.knows_tools = self._tool_form is not None

    def _look(self) -> None:
        """See how the template treats answers, results of tools, and tools."""
        asked, written = Message("user", _PROBE[0]), f"{OPEN}\n{_PROBE[4]}\n{CLOSE}\n{_PROBE[1]}"
        talk = [asked, Message("assistant", written), Message("user", _PROBE[2])]
        prompt = self._probed(talk[:1])
        if prompt is None:
            return  # whoever uses it is told why
        self._always_asked = self._found_always_asked(prompt)
        self.opens_thoughts = opens_thoughts(prompt)
        answered, goes_on = self._probed(talk[:2]), self._probed(talk)
        if answered is not None and goes_on is not None:
            self.keeps_earlier_answers = (
                answered.startswith(prompt)
                and goes_on.startswith(answered)
                and _PROBE[4] in answered[len(prompt) :]
            )
            self.one_row_per_conversation = (
                self.keeps_earlier_answers
                and not self.opens_thoughts
                and answered.endswith(_PROBE[1])
                # Between special tokens a text is encoded alone, so an answer is the same tokens anywhere.
                and self._is_special(prompt, at_end=True)
                and self._is_special(goes_on[len(answered) :], at_end=False)
            )
        for role in _RESULT_ROLES:
            self._result_role = role
            told = [Message("user", "x"), Message("assistant", "x"), Message("observation", _PROBE[3])]
            if _PROBE[3] in (self._probed(told) or ""):
                break
        else:
            self._result_role = _RESULT_ROLES[0]
        for form in itertools.starmap(_ToolForm, itertools.product((False, True), (True, False))):
            self._tool_form = form
            told = [Message("system", "", tools=json.dumps([_TOOL])), asked]
            if _TOOL_NAME in (self._probed(told) or ""):
                return
        self._tool_form = None

    def _found_always_asked(self, prompt: str) -> str:
        """Return what asks for an answer behind every conversation, also one that nobody asks to go on.

        Some releases' templates (GLM-Edge's) never look at ``add_generation_prompt``: they end with the
        assistant's role in any case. Left there, it would be taken for the token that ends an answer.
        """
        asked, answer = Message("user", _PROBE[0]), Message("assistant", _PROBE[1])
        try:
            if self._run([asked], asks=False) != prompt:
                return ""
            behind = self._run([asked, answer], asks=False).rpartition(_PROBE[1])[2]
            goes_on = self._run([asked, answer, Message("user", _PROBE[2])], asks=False)
        except DataError:
            return ""
        between = goes_on.rpartition(_PROBE[1])[2].partition(_PROBE[2])[0]
        # What stands behind an answer however it goes on is its end; the rest asks for the next one.
        parts = [[behind], [between]]
        if self._pattern is not None:
            parts = [[part for part in self._pattern.split(text) if part] for text in (behind, between)]
        alike = itertools.takewhile(lambda two: two[0] == two[1], zip(*parts, strict=False))
        return behind[sum(len(part) for part, _ in alike) :]

    def _probed(self, messages: Sequence[Message]) -> str | None:
        try:
            return self.render(messages)
        except DataError:
            return None

    def _is_special(self, text: str, *, at_end: bool) -> bool:
        if self._pattern is None or not text:
            return False
        parts = self._pattern.split(text)  # names stand at odd places, what is between at even ones
        return len(parts) > 1 and not parts[-1 if at_end else 0]

    # ---- text ----

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """Return the conversation as the template renders it.

        Raises:
            DataError: there is no template, or it refuses these messages.
        """
        check_roles(messages)
        return self._run(messages, asks=generation_prompt and messages[-1].role != "assistant")

    def _run(self, messages: Sequence[Message], *, asks: bool) -> str:
        items = [as_item(message, message.content) for message in messages]
        return self._rendered(messages, items, _tools(messages), asks=asks)

    def _rendered(
        self,
        messages: Sequence[Message],
        items: Sequence[dict[str, Any]],
        tools: list[Any] | None,
        *,
        asks: bool,
    ) -> str:
        """Run the template.

        Args:
            messages: oldest first.
            items: the same as templates see them, with or without marks.
            tools: descriptions.
            asks: end with the prompt for an answer.
        """
        if self.source is None:
            raise DataError(
                "This checkpoint has no chat template, so it answers no chat messages: it goes on with plain "
                "text. Give it prompts as plain text, or take the release that was tuned for chat."
            )
        if tools is not None and self._tool_form is None:
            raise DataError("The checkpoint's chat template knows no tools. Leave them out.")
        given: list[dict[str, Any]] = []
        in_message = self._tool_form is not None and self._tool_form.in_message
        if tools is not None and self._tool_form is not None:
            wrap = self._tool_form.is_wrapped
            bare = [described(tool) for tool in tools]
            tools = [{"type": "function", "function": tool} for tool in bare] if wrap else list(bare)
        for message, item in zip(messages, items, strict=True):
            if message.tools and in_message:
                item = {**item, "tools": tools}
            elif message.tools and not message.content:
                continue  # it only carries the tools, which the template is given apart
            given.append(item | ({"role": self._result_role} if message.role == "observation" else {}))
        text = rendered(self.source, given, None if in_message else tools, asks=asks, named=self._named)
        return text if asks else text.removesuffix(self._always_asked)

    def pieces(self, messages: Sequence[Message], *, asks: bool) -> list[Piece]:
        """Return the rendered conversation in pieces.

        Args:
            messages: oldest first.
            asks: end with the prompt for an answer.

        Raises:
            DataError: they do not join to what the template renders, or it refuses the messages, or leaves
                one out.
        """
        given = marked(messages, _tools(messages), self._names)
        text = self._run(messages, asks=asks)
        return pieces_of(text, self._rendered(messages, given.messages, given.tools, asks=asks), given)

    # ---- ids ----

    def encode_prompt(
        self, tokenizer: TextTokenizer, messages: Sequence[Message], *, generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of a conversation that asks for an answer.

        Raises:
            DataError: the last message is no question and no tool's result; see `pieces`.
        """
        check_last(messages, ("user", "observation"))
        return self._encoded(tokenizer, self.pieces(messages, asks=generation_prompt))

    def encode_answer(self, tokenizer: TextTokenizer, answer: Message) -> list[int]:
        """Return the ids that the model shall write: what follows the prompt, and the id that ends it.

        Raises:
            DataError: the template renders no answer behind its own prompt for one; see `pieces`.
        """
        found = self._answer([Message("user", _PROBE[0])], answer)
        ids = self._encoded(tokenizer, found.written)
        return [*ids, *self._end_ids(tokenizer, found.behind, is_call=bool(answer.metadata))]

    def encode_continuation(self, tokenizer: TextTokenizer, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the last message, for a cache that ends with the answer before it.

        Raises:
            DataError: the template renders earlier answers in another way once the conversation goes on.
        """
        check_last(messages, ("user", "observation"))
        last = _last_answer(messages)
        if last is None:
            return self.encode_prompt(tokenizer, messages)
        if not self.keeps_earlier_answers:
            raise DataError(
                "The checkpoint's chat template renders earlier answers anew in every turn, so no cache can "
                "be kept from one turn to the next."
            )
        answered = _without_end(self.pieces(messages[: last + 1], asks=False))
        rest = _behind(self.pieces(messages, asks=True), _joined(answered))
        if rest is None:
            raise _not_found("earlier answers are rendered anew when the conversation goes on")
        return self._encoded(tokenizer, rest)

    def encode_conversation(
        self, tokenizer: TextTokenizer, messages: Sequence[Message]
    ) -> tuple[list[int], list[bool]]:
        """Return all ids; loss falls on what the model writes: every answer and the token that ends it.

        Raises:
            DataError: the last message is no answer; there are several, and an earlier one reads otherwise
                than when it was written; see `pieces`.
        """
        check_last(messages, ("assistant",))
        num_answers = sum(message.role == "assistant" for message in messages)
        if not self.one_row_per_conversation and num_answers > 1:
            raise _not_found("earlier answers are other tokens once the conversation goes on")
        ids: list[int] = []
        mask: list[bool] = []
        ends_answer = False  # the next token, the role of the next message, ends an answer that is learnt
        for place, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._encoded(tokenizer, self._new_pieces(messages[:place]))
            found = self._answer(messages[:place], message)
            answer = self._encoded(tokenizer, found.written)
            ids += [*prompt, *answer]
            mask += [ends_answer, *[False] * (len(prompt) - 1), *[message.has_loss] * len(answer)]
            ends_answer = message.has_loss
            if place == len(messages) - 1:
                end = self._end_ids(tokenizer, found.behind, is_call=bool(message.metadata))
                return [*ids, *end], [*mask, *[ends_answer] * len(end)]
        raise AssertionError("the last message is an answer")

    def call_opening(self, tokenizer: TextTokenizer, name: str) -> list[int]:
        """Return the ids with which an answer begins that calls a tool, behind the prompt for it.

        Args:
            tokenizer: of the folder.
            name: of the tool.
        """
        before = [Piece("\n", True), Piece(CLOSE, False), Piece("\n", True)] if self.opens_thoughts else []
        return self._encoded(tokenizer, [*before, Piece(f"{name}\n", True)])

    def _new_pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return what stands behind the last answer, the prompt for the next one included."""
        pieces = self.pieces(messages, asks=True)
        last = _last_answer(messages)
        if last is None:
            return pieces
        rest = _behind(pieces, self._run(messages[: last + 1], asks=False))
        if rest is None:
            raise _not_found("earlier answers are rendered anew when the conversation goes on")
        return rest

    def _answer(self, messages: Sequence[Message], answer: Message) -> _Answer:
        """Find what the model writes behind the template's prompt for an answer."""
        prompt = self._run(messages, asks=True)
        thoughts = thoughts_and_rest(answer.content)
        if opens_thoughts(prompt):
            # What the template itself would show of a past answer is without its thoughts; the model writes
            # them behind the tag that the prompt ends with.
            shown = replace(answer, content=thoughts[1].strip() if thoughts else answer.content)
            whole = self.pieces([*messages, shown], asks=False)
            if not _joined(whole).startswith(prompt.rstrip().removesuffix(OPEN).rstrip()):
                raise _not_found("an answer does not stand behind the prompt that asks for it")
            behind = _end_of(whole) if shown.content.strip() else []
            said = thoughts[1] if thoughts else f"\n{answer.content}"
            if answer.metadata:  # a call stands on lines of its own
                said = f"\n{answer.metadata}\n{shown.content}"
            first = thoughts[0] if thoughts else "\n"
            return _Answer([Piece(first, True), Piece(CLOSE, False), Piece(said, True)], behind)
        rest = _behind(self.pieces([*messages, answer], asks=False), prompt)
        if rest is None:
            raise _not_found("an answer does not stand behind the prompt that asks for it")
        behind = _end_of(rest)
        written = rest[: len(rest) - len(behind)]
        text = _joined(written)
        if thoughts is None or (OPEN in text and thoughts[0].strip() in text):
            return _Answer(written, behind)
        # The template shows an answer without its thoughts, also the last one: they stand where it begins.
        said = [Piece(OPEN, False), Piece(thoughts[0], True), Piece(CLOSE, False), Piece(thoughts[1], True)]
        first = next((at for at, piece in enumerate(written) if piece.is_content), len(written))
        return _Answer([*written[:first], *said], behind)

    def _end_ids(self, tokenizer: TextTokenizer, behind: Sequence[Piece], *, is_call: bool) -> list[int]:
        """Return the ids that end an answer: those up to the template's special token, else the end id.

        A call of a tool ends with the token that opens its result, as GLM-4 writes it.
        """
        parts = [] if self._pattern is None else self._pattern.split(_joined(behind))
        if len(parts) > 1:
            return self._encoded(tokenizer, [Piece(parts[0] + parts[1], False)])
        ends_call = is_call and _TURN_ENDS[-1] in self._names
        return [tokenizer.get_command(_TURN_ENDS[-1]) if ends_call else tokenizer.end_id]

    def _encoded(self, tokenizer: TextTokenizer, pieces: Sequence[Piece]) -> list[int]:
        """Encode pieces; between special tokens of the template, literal and content melt into one text.

        That is how transformers encodes a rendered conversation, but for names of special tokens in contents.
        """
        parts: list[tuple[bool, str]] = []  # (is a special token, text)
        for piece in pieces:
            if piece.is_content or self._pattern is None:
                text = piece.text
                if self._hidden is not None and HIDDEN in text:
                    text = self._hidden.sub(lambda found: found[0].replace(HIDDEN, ""), text)
                parts.append((False, text))
                continue
            found = self._pattern.split(piece.text)
            parts += [(bool(at % 2), part) for at, part in enumerate(found) if part]
        ids: list[int] = []
        for is_special, group in itertools.groupby(parts, key=lambda part: part[0]):
            texts = [text for _, text in group]
            if is_special:
                ids += [tokenizer.get_command(name) for name in texts]
            else:
                ids += tokenizer.text_ids("".join(texts))
        return ids

    # ---- tools and answers ----

    def announce_tools(self, content: str, tools: Sequence[Mapping[str, object]]) -> Message:
        """Return the system message that carries ``tools``; the template itself describes them.

        Raises:
            DataError: the template shows none.
        """
        if not self.knows_tools:
            names = ", ".join(f"`{tool.get('name')}`" for tool in tools)
            raise DataError(f"The checkpoint's chat template shows no tools; given: {names}. Leave them out.")
        return Message("system", content, tools=json.dumps(list(tools), ensure_ascii=False))

    def call_text(self, arguments: Mapping[str, object]) -> str:
        """Return the arguments as JSON; the tool's name is metadata."""
        return json.dumps(dict(arguments), ensure_ascii=False)

    def stop_ids(self, tokenizer: TextTokenizer) -> tuple[int, ...]:
        """Return the end id, and the special tokens that stand behind an answer of a GLM."""
        ends = [tokenizer.get_command(name) for name in _TURN_ENDS if name in self._names]
        return tuple(dict.fromkeys([tokenizer.end_id, *ends]))

    def clean_answer(self, text: str) -> str:
        """Return the answer without thoughts."""
        return split_thoughts(f"{self.answer_opening}{text}")[1]

    @property
    def answer_opening(self) -> str:
        """The tag of thoughts where the prompt ends with it: the beginning of what the model says."""
        return OPEN if self.opens_thoughts else ""


@lru_cache(maxsize=16)
def folder_template(
    source: str | None, names: tuple[str, ...] = (), named: tuple[tuple[str, str], ...] = ()
) -> FolderTemplate:
    """Return the template of a Jinja source; each is looked at once.

    Args:
        source: Jinja.
        names: of the special tokens.
        named: special tokens by their usual names.
    """
    return FolderTemplate(source, names, dict(named))


def _tools(messages: Sequence[Message]) -> list[Any] | None:
    return next((json.loads(message.tools) for message in messages if message.tools), None)


def _last_answer(messages: Sequence[Message]) -> int | None:
    return max((at for at, message in enumerate(messages) if message.role == "assistant"), default=None)


def _joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _behind(pieces: Sequence[Piece], text: str) -> list[Piece] | None:
    """Return the pieces that stand behind a text; None: they do not begin with it."""
    if not _joined(pieces).startswith(text):
        return None
    rest: list[Piece] = []
    left = len(text)
    for piece in pieces:
        if left < len(piece.text):
            rest.append(Piece(piece.text[left:], piece.is_content))
        left = max(0, left - len(piece.text))
    return rest


def _end_of(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces behind the last content; none where there is no content to be behind."""
    last = max((at for at, piece in enumerate(pieces) if piece.is_content), default=len(pieces))
    return list(pieces[last + 1 :])


def _without_end(pieces: Sequence[Piece]) -> list[Piece]:
    return list(pieces[: len(pieces) - len(_end_of(pieces))])


def _not_found(reason: str) -> DataError:
    return DataError(
        f"The checkpoint's chat template cannot be trained on: {reason}, so it is not known which tokens the "
        "model is to write. Nothing is guessed: tune with plain text (an answer without a question), or give "
        "the folder a chat template that keeps answers as they are."
    )
