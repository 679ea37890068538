r"""Which part of what a chat template renders is whose: contents are found by marks in their places.

A chat template is a program (Jinja) that turns messages into one text. It is rendered twice, once with the
messages and once with marks for their contents, and the two are laid beside each other::

    rendered with marks   [gMASK]<sop><|user|>\n ⟦0⟧ <|assistant|>\n ⟦1⟧
    so the text is        [gMASK]<sop><|user|>\n | Hi | <|assistant|>\n | Hello

The pieces must join to the text itself, to the letter, else nothing is known about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.models.templates.thinking import CLOSE, OPEN
from glmtune.models.templates.time_limit import limited

RENDER_SECONDS = 5.0
"""Longest time of a template: it takes milliseconds, but it is a program and may never end."""
_OPENS, _ENDS = "\ue000", "\ue001"
_MARK = re.compile(f"{_OPENS}([0-9]{{1,9}}){_ENDS}")
"""Two characters that no text means: Unicode leaves them to private use."""
HIDDEN = "\ufdd0"
"""What templates of exports write inside names that are text, and their tokenizers drop again."""
_TAGS = re.compile(f"({re.escape(OPEN)}|{re.escape(CLOSE)})")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation.

    Attributes:
        text: as it stands there.
        is_content: a message's own text, in which no special token is recognised.
    """

    text: str
    is_content: bool


@dataclass(frozen=True, slots=True)
class _Fragment:
    """What a mark stands for; one in front of a tag of thoughts is empty, but makes the tag text."""

    text: str
    is_before_tag: bool = False


@dataclass(frozen=True, slots=True)
class MarkedMessages:
    """Messages with marks in the place of what they say.

    Attributes:
        messages: as templates see them.
        tools: descriptions of tools, names of special tokens in them marked.
        fragments: what each mark stands for.
        names: finds the names of special tokens.
        needed: of each message that says something, its place and the marks of which one has to be shown.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    fragments: list[_Fragment]
    names: re.Pattern[str] | None
    needed: list[tuple[int, set[int]]]


def marked(messages: Sequence[Message], tools: Sequence[Any] | None, names: Sequence[str]) -> MarkedMessages:
    """Put numbered marks into messages.

    Empty contents, blanks, and the tags of thoughts stay, as templates look at them.

    Args:
        messages: oldest first.
        tools: descriptions of tools, if any.
        names: of special tokens, which are text where a message or a tool has them.
    """
    fragments: list[_Fragment] = []
    needed: list[tuple[int, set[int]]] = []
    given: list[dict[str, Any]] = []

    def mark(text: str, *, is_before_tag: bool = False) -> str:
        fragments.append(_Fragment(text, is_before_tag))
        return f"{_OPENS}{len(fragments) - 1}{_ENDS}"

    def mark_content(message: Message) -> str:
        is_answer = message.role == "assistant"
        shown = ""
        for part in _TAGS.split(message.content):
            if part in (OPEN, CLOSE):
                # A model writes tags itself, as the special tokens that some vocabularies have for them.
                shown += part if is_answer else mark("", is_before_tag=True) + part
            else:
                shown += mark(part) if part.strip() else part
        return shown

    for place, message in enumerate(messages):
        first = len(fragments)
        content = mark_content(message)
        said = _answer_marks(content) if message.role == "assistant" else set(range(first, len(fragments)))
        said = {number for number in said if fragments[number].text.strip()}
        if said:
            needed.append((place, said))
        item = as_item(message, content)
        if message.metadata:
            item["metadata"] = mark(message.metadata)
            if message.role == "assistant":
                needed.append((place, {len(fragments) - 1}))
        given.append(item)
    pattern = names_pattern(names)
    shown_tools = None if tools is None else [_with_marks(tool, pattern, mark) for tool in tools]
    return MarkedMessages(given, shown_tools, fragments, pattern, needed)


def _answer_marks(content: str) -> set[int]:
    """Return the marks of an answer behind its thoughts, which a template may leave out."""
    thoughts, close, answer = content.rpartition(CLOSE)
    del thoughts
    shown = answer if close or OPEN not in content else ""
    return {int(number) for number in _MARK.findall(shown)}


def _with_marks(value: Any, pattern: re.Pattern[str] | None, mark: Callable[[str], str]) -> Any:
    """Return plain JSON with marks for the names of special tokens."""
    if isinstance(value, str) and pattern is not None:
        return pattern.sub(lambda found: mark(found[0]), value)
    if isinstance(value, Mapping):
        return {
            _with_marks(key, pattern, mark): _with_marks(each, pattern, mark) for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_with_marks(each, pattern, mark) for each in value]
    return value


def names_pattern(names: Sequence[str]) -> re.Pattern[str] | None:
    """Return what finds the names of special tokens, the longest first; None where there are none."""
    if not names:
        return None
    return re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})")


def as_item(message: Message, content: str) -> dict[str, Any]:
    """Return a message as templates see it."""
    item: dict[str, Any] = {"role": message.role, "content": content}
    return item | ({"metadata": message.metadata} if message.metadata else {})


def pieces_of(text: str, with_marks: str, given: MarkedMessages) -> list[Piece]:
    """Lay a text beside the one with marks.

    Args:
        text: the template's, of the messages themselves.
        with_marks: the template's, of ``given``.
        given: the messages with marks.

    Raises:
        DataError: the template changes contents so that they are not found, or leaves a message out.
    """
    parts = _MARK.split(with_marks)
    literals, numbers = parts[0::2], [int(number) for number in parts[1::2]]
    shown = set(numbers)
    for place, marks in given.needed:
        if not shown & marks:
            role = given.messages[place]["role"]
            raise DataError(
                f"The checkpoint's chat template does not show all of message {place + 1} (`{role}`). Leave "
                "it out, or put what it says into a question."
            )
    # What stands between two marks stands in the text as well, so each content reaches from one literal to
    # the next; `_found` knows the few ways in which templates change it.
    pieces = [Piece(literals[0], False)]
    place, is_exact = len(literals[0]), text.startswith(literals[0])
    for number, literal in zip(numbers, literals[1:], strict=True):
        fragment = given.fragments[number] if number < len(given.fragments) else None
        content = None if fragment is None else _found(fragment.text, literal, text, place, given.names)
        if fragment is None or content is None:
            is_exact = False
            break
        pieces.append(Piece(content, True))
        place += len(content) + len(literal)
        if fragment.is_before_tag and (tag := _TAGS.match(literal)):
            pieces.append(Piece(tag[0], True))
            literal = literal[tag.end() :]
        pieces.append(Piece(literal, False))
    if not is_exact or place != len(text):
        raise DataError(
            "The checkpoint's chat template changes what messages say in a way that cannot be followed, so "
            "it is not known which tokens are whose. Nothing is guessed: tune with plain text, "
            "or give the folder a chat template that writes contents as they are."
        ).see("chat-template")
    return [piece for piece in pieces if piece.text]


def _found(content: str, literal: str, text: str, place: int, names: re.Pattern[str] | None) -> str | None:
    """Return what stands for a content: as it is, or stripped; None: it was changed otherwise."""
    for form in _forms(content, names):
        if text.startswith(form, place) and text.startswith(literal, place + len(form)):
            return form
    return None


def _forms(content: str, names: re.Pattern[str] | None) -> Iterator[str]:
    changes: tuple[Callable[[str], str], ...] = (str, str.rstrip, str.lstrip, str.strip)
    yield from dict.fromkeys(change(content) for change in changes)
    if names is not None and names.search(content):
        hidden = names.sub(lambda found: hidden_name(found[0]), content)
        yield from dict.fromkeys(change(hidden) for change in changes)


def hidden_name(name: str) -> str:
    """Return the name of a special token as templates of exports write it where it is text."""
    return f"{name[0]}{HIDDEN}{name[1:]}"


def rendered(
    source: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Any] | None,
    *,
    asks: bool,
    named: Mapping[str, str],
) -> str:
    """Run a template in transformers' sandbox.

    Args:
        source: Jinja.
        messages: as the template sees them.
        tools: descriptions, if any.
        asks: end with the prompt for an answer.
        named: special tokens by their usual names (``eos_token``).

    Raises:
        DataError: it fails, or takes longer than ``RENDER_SECONDS``.
    """
    variables: dict[str, Any] = dict(named)

    def run() -> str:
        result: Any = render_jinja_template(
            [list(messages)],
            tools=None if tools is None else list(tools),
            chat_template=source,
            add_generation_prompt=asks,
            **variables,
        )
        texts: list[str] = result[0] if isinstance(result, tuple) else result
        return texts[0]

    try:
        text = limited(run, RENDER_SECONDS)
    except Exception as error:  # a program of a stranger: whatever it raises is its refusal
        raise DataError(
            f"The checkpoint's chat template refuses these messages ({type(error).__name__}: "
            f"{str(error)[:200]}). Reorder or merge them, or leave out what it does not know."
        ) from error
    if text is None:
        raise DataError(
            f"The checkpoint's chat template takes longer than {RENDER_SECONDS:g} seconds for "
            f"{len(messages)} messages, so it may never end. Give the folder another template."
        )
    return text
