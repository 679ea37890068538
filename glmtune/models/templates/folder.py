r"""The chat template of a folder in transformers' format, with every answer found exactly in what it renders.

Such a template is a program (Jinja) that turns messages into one text. transformers' sandbox runs it; this
module finds out which part of the text is whose. It renders twice: once with the messages, once with marks in
the place of their contents::

    rendered with marks   [gMASK]<sop><|user|>\n ⟦0⟧ <|assistant|>\n ⟦1⟧
    so the text is        [gMASK]<sop><|user|>\n | Hi | <|assistant|>\n | Hello

The pieces must join to the text that the template makes of the messages themselves, to the letter; a template
for which they do not is refused by name. So names of special tokens count where the template wrote them and
are plain text where a user did, and an answer's tokens are those that the model itself will write: what
follows the prompt that the template ends with an answer asked for.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.models.templates.base import TextTokenizer, check_last, check_roles
from glmtune.models.templates.thinking import CLOSE, OPEN, opens_thoughts, split_thoughts

_TURN_ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")
"""Special tokens at which GLM's answers end, where the vocabulary has them; beside the end token."""
_PROBE = ("1", "2", "3", "4")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation.

    Attributes:
        text: as it stands there.
        is_content: a message's own text, in which no special token is recognised.
    """

    text: str
    is_content: bool


class FolderTemplate:
    """Renders with the Jinja template of a checkpoint's folder.

    Attributes:
        source: the template; None where the folder has none, so that only plain text can be continued.
        one_row_per_conversation: an earlier answer reads like the last one: one row can hold all.
        knows_tools: the template shows ``tools``.
    """

    name: ClassVar[str] = "transformers"
    tools_introduction: ClassVar[str] = ""
    bidirectional_context: ClassVar[bool] = False

    def __init__(self, source: str | None) -> None:
        """Take a template; it is rendered a few times, to see how it treats answers.

        Args:
            source: Jinja.
        """
        self.source = source
        self.knows_tools = source is not None and "tools" in source
        self.one_row_per_conversation = source is not None and self._keeps_earlier_answers()

    # ---- text ----

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """Return the conversation as the template renders it.

        Raises:
            DataError: there is no template, or it refuses these messages.
        """
        check_roles(messages)
        asks = generation_prompt and messages[-1].role != "assistant"
        return self._run(messages, [message.content for message in messages], asks=asks)

    def _run(self, messages: Sequence[Message], contents: Sequence[str], *, asks: bool) -> str:
        """Run the template with other contents in the messages."""
        if self.source is None:
            raise DataError(
                "This checkpoint has no chat template, so it answers no chat messages: it goes on with plain "
                "text. Give it prompts as plain text, or take the release that was tuned for chat."
            )
        tools = next((json.loads(message.tools) for message in messages if message.tools), None)
        given = [_for_jinja(message, text) for message, text in zip(messages, contents, strict=True)]
        try:
            found: Any = render_jinja_template(
                [given], tools=tools, chat_template=self.source, add_generation_prompt=asks
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise DataError(
                f"The checkpoint's chat template refuses these messages ({type(error).__name__}: "
                f"{str(error)[:200]}). Reorder or merge them, or leave out what it does not know."
            ) from error
        rendered: list[str] = found[0] if isinstance(found, tuple) else found
        return rendered[0]

    def pieces(self, messages: Sequence[Message], *, asks: bool) -> list[Piece]:
        """Return the rendered conversation in pieces, see the head of this module.

        Args:
            messages: oldest first.
            asks: end with the prompt for an answer.

        Raises:
            DataError: they do not join to what the template renders, or it refuses the messages.
        """
        text = self._run(messages, [message.content for message in messages], asks=asks)
        marks, fragments = _marked(messages)
        marked = re.split(_MARK, self._run(messages, marks, asks=asks))
        literals, numbers = marked[0::2], [int(number) for number in marked[1::2]]
        found = [Piece(literals[0], False)]
        place = len(literals[0])
        exact = text.startswith(literals[0])
        for number, literal in zip(numbers, literals[1:], strict=True):
            content = next(
                (
                    form
                    for form in _forms(fragments[number])
                    if text.startswith(form, place) and text.startswith(literal, place + len(form))
                ),
                None,
            )
            if content is None:
                exact = False
                break
            found += [Piece(content, True), Piece(literal, False)]
            place += len(content) + len(literal)
        if not exact or place != len(text):
            raise DataError(
                "The checkpoint's chat template changes what messages say in a way that cannot be followed, "
                "so it is not known which tokens are whose. Nothing is guessed: tune this checkpoint with "
                "plain text, or give it a chat template that writes contents as they are."
            )
        return [piece for piece in found if piece.text]

    # ---- ids ----

    def encode_prompt(
        self, tokenizer: TextTokenizer, messages: Sequence[Message], *, generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of a conversation that asks for an answer.

        Raises:
            DataError: the last message is no question and no tool's result; see `pieces`.
        """
        check_last(messages, ("user", "observation"))
        return _encoded(tokenizer, self.pieces(messages, asks=generation_prompt))

    def encode_answer(self, tokenizer: TextTokenizer, answer: Message) -> list[int]:
        """Return the ids that the model shall write: what follows the prompt, and the id that ends it.

        Raises:
            DataError: the template renders no answer behind its own prompt for one; see `pieces`.
        """
        asked = Message("user", _PROBE[0])
        return [*_encoded(tokenizer, self._answer_pieces([asked], answer)), tokenizer.end_id]

    def encode_continuation(self, tokenizer: TextTokenizer, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the last message, for a cache that ends with the answer before it.

        Raises:
            DataError: the template renders earlier answers in another way once the conversation goes on.
        """
        check_last(messages, ("user", "observation"))
        if len(messages) == 1:
            return self.encode_prompt(tokenizer, messages)
        cached = _joined(self.pieces(messages[:-1], asks=False))
        rest = _behind(self.pieces(messages, asks=True), cached)
        if rest is None or not self.one_row_per_conversation:
            raise DataError(
                "The checkpoint's chat template renders earlier answers anew in every turn, so no cache can "
                "be kept from one turn to the next."
            )
        return _encoded(tokenizer, rest)

    def encode_conversation(
        self, tokenizer: TextTokenizer, messages: Sequence[Message]
    ) -> tuple[list[int], list[bool]]:
        """Return all ids; loss falls on what the model writes: every answer and the token that ends it.

        Raises:
            DataError: the last message is no answer; an earlier answer reads otherwise than when it was
                written; see `pieces`.
        """
        check_last(messages, ("assistant",))
        ids: list[int] = []
        mask: list[bool] = []
        before: list[Message] = []
        ends_answer = False  # the next token, the role of the next message, ends an answer that is learnt
        for message in messages:
            if message.role == "assistant":
                prompt = _encoded(tokenizer, self._new_pieces(before))
                answer = _encoded(tokenizer, self._answer_pieces(before, message))
                ids += [*prompt, *answer]
                mask += [ends_answer, *[False] * (len(prompt) - 1), *[message.has_loss] * len(answer)]
                ends_answer = message.has_loss
            before.append(message)
        return [*ids, tokenizer.end_id], [*mask, ends_answer]

    def _new_pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return what stands behind the last answer, the prompt for the next one included."""
        pieces = self.pieces(messages, asks=True)
        last = max((at for at, message in enumerate(messages) if message.role == "assistant"), default=None)
        if last is None:
            return pieces
        rest = _behind(pieces, _joined(self.pieces(messages[: last + 1], asks=False)))
        if rest is None:
            raise _not_found("earlier answers are rendered anew when the conversation goes on")
        return rest

    def _answer_pieces(self, messages: Sequence[Message], answer: Message) -> list[Piece]:
        """Return what the template renders behind its prompt for an answer."""
        prompt = self._run(messages, [message.content for message in messages], asks=True)
        if opens_thoughts(prompt):
            # What the template itself would show of a past answer is without its thoughts; the model writes
            # them behind the tag that the prompt ends with.
            thoughts, close, rest = answer.content.removeprefix(OPEN).rpartition(CLOSE)
            return [
                Piece(thoughts if close else "\n", True),
                Piece(CLOSE, False),
                Piece(rest if close else f"\n{rest}", True),
            ]
        rest = _behind(self.pieces([*messages, answer], asks=False), prompt)
        if rest is None:
            raise _not_found("an answer does not stand behind the prompt that asks for it")
        return rest

    def _keeps_earlier_answers(self) -> bool:
        """Whether a conversation of two turns holds the first answer as it was written."""
        asked = [Message(role, text) for role, text in zip(("user", "assistant") * 2, _PROBE, strict=True)]
        asked[1] = Message("assistant", f"{OPEN}\n5\n{CLOSE}\n2")
        try:
            first = self.render(asked[:1]), self.render(asked[:2])
            return first[1].startswith(first[0]) and self.render(asked[:3]).startswith(first[1])
        except DataError:
            return False  # whoever uses it is told

    # ---- tools and answers ----

    def announce_tools(self, content: str, tools: Sequence[Mapping[str, object]]) -> Message:
        """Return the system message; the template itself writes what ``tools`` describe."""
        if not self.knows_tools:
            raise DataError("The checkpoint's chat template knows no tools. Leave them out.")
        return Message("system", content, tools=json.dumps(list(tools), ensure_ascii=False))

    def call_text(self, arguments: Mapping[str, object]) -> str:
        """Return the arguments as JSON; the tool's name is metadata."""
        return json.dumps(dict(arguments), ensure_ascii=False)

    def stop_ids(self, tokenizer: TextTokenizer) -> tuple[int, ...]:
        """Return the end id, and the special tokens that stand behind an answer of a GLM."""
        names: Sequence[str] = cast(Any, tokenizer).command_names
        ends = [tokenizer.get_command(name) for name in _TURN_ENDS if name in names]
        return tuple(dict.fromkeys([tokenizer.end_id, *ends]))

    def clean_answer(self, text: str) -> str:
        """Return the answer without thoughts."""
        return split_thoughts(text)[1]


@lru_cache(maxsize=16)
def folder_template(source: str | None) -> FolderTemplate:
    """Return the template of a Jinja source; each is looked at once."""
    return FolderTemplate(source)


_MARK = re.compile("\ue000([0-9]+)\ue001")
"""Two characters that no text means: Unicode leaves them to private use."""


def _marked(messages: Sequence[Message]) -> tuple[list[str], list[str]]:
    """Put numbered marks into messages; empty contents and tags of thoughts stay, as templates look at them.

    Returns:
        The contents with marks, and what each mark stands for.
    """
    fragments: list[str] = []
    contents: list[str] = []
    for message in messages:
        parts = re.split(f"({re.escape(OPEN)}|{re.escape(CLOSE)})", message.content)
        marked = ""
        for part in parts:
            if part in ("", OPEN, CLOSE):
                marked += part
                continue
            marked += f"\ue000{len(fragments)}\ue001"
            fragments.append(part)
        contents.append(marked)
    return contents, fragments


def _forms(content: str) -> Iterator[str]:
    """Yield what templates make of a content: as it is, or stripped."""
    changes: tuple[Callable[[str], str], ...] = (str, str.rstrip, str.lstrip, str.strip)
    yield from dict.fromkeys(change(content) for change in changes)


def _for_jinja(message: Message, content: str) -> dict[str, str]:
    given = {"role": message.role, "content": content}
    return given | ({"metadata": message.metadata} if message.metadata else {})


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


def _not_found(reason: str) -> DataError:
    return DataError(
        f"The checkpoint's chat template cannot be trained on: {reason}, so it is not known which tokens the "
        "model is to write. Nothing is guessed: tune with plain text (an answer without a question), or give "
        "the folder a chat template that keeps answers as they are."
    )


def _encoded(tokenizer: TextTokenizer, pieces: Sequence[Piece]) -> list[int]:
    """Encode pieces; between special tokens of the template, literal and content melt into one text.

    That is how transformers encodes a rendered conversation, but for names of special tokens in contents.
    """
    names: Sequence[str] = cast(Any, tokenizer).command_names
    pattern = (
        re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})") if names else None
    )
    ids: list[int] = []
    parts: list[tuple[bool, str]] = []  # (is a special token, text)
    for piece in pieces:
        if piece.is_content or pattern is None:
            parts.append((False, piece.text))
            continue
        parts += [(bool(at % 2), part) for at, part in enumerate(pattern.split(piece.text)) if part]
    for is_special, group in itertools.groupby(parts, key=lambda part: part[0]):
        texts = [text for _, text in group]
        if is_special:
            ids += [tokenizer.get_command(name) for name in texts]
        else:
            ids += tokenizer.text_ids("".join(texts))
    return ids
