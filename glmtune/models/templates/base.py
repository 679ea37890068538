"""What a prompt template is, what it needs of a tokenizer, and which conversations it may be given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from glmtune.errors import DataError, unknown_name
from glmtune.messages import ROLES, Message
from glmtune.models.releases.families import Family


class TextTokenizer(Protocol):
    """What a template needs of a tokenizer."""

    @property
    def family(self) -> Family:
        """The release."""
        ...

    @property
    def prefix_ids(self) -> list[int]:
        """The ids every input starts with."""
        ...

    @property
    def suffix_ids(self) -> list[int]:
        """The ids every input ends with."""
        ...

    @property
    def end_id(self) -> int:
        """The id that ends an answer."""
        ...

    def text_ids(self, text: str) -> list[int]:
        """Encode a text alone, recognising no command token."""
        ...

    def get_command(self, token: str) -> int:
        """Return the id of a command token."""
        ...


class Template(Protocol):
    """The prompt rules of a release.

    Attributes:
        name: what ``render_prompt(template=...)`` calls it.
        one_row_per_conversation: whether one sequence of ids can carry the loss of every assistant turn
            (then ``encode_conversation`` works); otherwise each assistant turn needs a row of its own.
        knows_tools: whether a system message can announce tools, and messages carry metadata.
        tools_introduction: the system message above tools where the conversation has none; empty where the
            release knows no tools.
        bidirectional_context: whether the context is read in both directions (ChatGLM-6B). Then ``sop``, the
            last id of a prompt, starts the answer: it carries loss and, like the end id, is one of
            ``max_target_length`` rather than of ``max_source_length``.
        answer_opening: what the prompt ends with and a reader of the answer puts in front of it again: the
            tag that opens thoughts; mostly empty.
    """

    name: ClassVar[str]
    tools_introduction: ClassVar[str]
    bidirectional_context: ClassVar[bool]

    @property
    def one_row_per_conversation(self) -> bool:
        """See the class."""
        ...

    @property
    def knows_tools(self) -> bool:
        """See the class."""
        ...

    @property
    def answer_opening(self) -> str:
        """See the class."""
        ...

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """Return the conversation as text.

        Args:
            messages: oldest first.
            generation_prompt: end with the text that asks for an answer, if the last message is no answer.

        Raises:
            DataError: the order or the roles of the messages do not fit the template.
        """
        ...

    def encode_prompt(
        self, tokenizer: TextTokenizer, messages: Sequence[Message], *, generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids a model answers to; the last message is the one to answer.

        Raises:
            DataError: as ``render``, and if the last message is an answer or there is none.
        """
        ...

    def encode_answer(self, tokenizer: TextTokenizer, answer: Message) -> list[int]:
        """Return the ids of an answer, the id that ends it included."""
        ...

    def encode_continuation(self, tokenizer: TextTokenizer, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the last message alone, for a cache that holds everything before it.

        The cache is expected to end with the last answer, without the id that ended it. Without an
        earlier turn this equals ``encode_prompt``.

        Raises:
            DataError: as ``encode_prompt``, and if no cache can be kept from one turn to the next.
        """
        ...

    def encode_conversation(
        self, tokenizer: TextTokenizer, messages: Sequence[Message]
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a whole conversation and which of them carry loss.

        Raises:
            DataError: the template has no such form, or the last message is no answer.
        """
        ...

    def announce_tools(self, content: str, tools: Sequence[Mapping[str, object]]) -> Message:
        """Return the system message that announces tools.

        Args:
            content: what the system message says.
            tools: their descriptions: ``name``, ``description`` and ``parameters``.

        Raises:
            DataError: the template knows no tools, or a description has no name.
        """
        ...

    def call_text(self, arguments: Mapping[str, object]) -> str:
        """Return the content of a message that calls a tool.

        Args:
            arguments: by name, plain JSON values.

        Raises:
            DataError: the template knows no tools.
        """
        ...

    def stop_ids(self, tokenizer: TextTokenizer) -> tuple[int, ...]:
        """Return the ids at which generation stops."""
        ...

    def clean_answer(self, text: str) -> str:
        """Turn decoded output into the answer to show."""
        ...


def check_roles(messages: Sequence[Message]) -> None:
    """Raise DataError unless there are messages and every role exists."""
    if not messages:
        raise DataError("The conversation holds 0 messages, but a prompt needs at least 1. Give a question.")
    for place, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            raise DataError(unknown_name(f"The role of message {place}", message.role, ROLES))


def check_last(messages: Sequence[Message], allowed: Sequence[str]) -> None:
    """Raise DataError unless the last message has one of the roles."""
    check_roles(messages)
    if messages[-1].role not in allowed:
        raise DataError(
            f"The last message has the role `{messages[-1].role}`, but here it must be "
            f"{' or '.join(f'`{role}`' for role in allowed)}. Drop the messages after the last of these."
        )


def split_system(messages: Sequence[Message], template: str) -> tuple[Message | None, Sequence[Message]]:
    """Take off a leading system message and check that the rest are questions and answers in turn.

    Args:
        messages: oldest first.
        template: its name, for the error.

    Returns:
        The system message, if there is one, and the turns: user, assistant, user, ...

    Raises:
        DataError: another order, another role, or a message with metadata.
    """
    check_roles(messages)
    system = messages[0] if messages[0].role == "system" else None
    turns = messages[1:] if system else messages
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise DataError(
                f"Message {index + 1 + (system is not None)} has the role `{message.role}`, but template "
                f"`{template}` takes an optional system message and then user and assistant in turn, so "
                f"`{expected}` is due. Reorder or merge the messages, or use ChatGLM3, which has role tokens."
            )
        if message.metadata:
            raise DataError(
                f"Message {index + 1 + (system is not None)} carries the metadata `{message.metadata}`, but "
                f"template `{template}` knows no tools. Remove it, or use ChatGLM3."
            )
    if not turns:
        raise DataError(
            f"The conversation holds only a system message, but template `{template}` needs a question."
        )
    return system, turns
