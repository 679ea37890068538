"""Templates whose prompt is one text: numbered rounds of ChatGLM-6B and ChatGLM2, plain text of CodeGeeX2.

Line breaks, colons and numbers are those the models were tuned on, character by character; answers get worse
where they differ, and nothing reports it. The text is encoded as a whole, because pieces may span the border
of two parts: ids of the parts, joined, are not the ids of the text.

Sources:
    ``chat`` and ``stream_chat`` in ``modeling_chatglm.py`` of THUDM/chatglm-6b and of THUDM/chatglm2-6b,
    ``build_prompt`` in the latter's ``tokenization_chatglm.py``; README of CodeGeeX2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.models.templates.base import TextTokenizer, check_last, split_system
from glmtune.models.templates.responses import clean_chatglm, clean_chatglm2, keep_text


class _TextTemplate(ABC):
    """What the templates have in common whose prompt is one text, encoded as a whole."""

    one_row_per_conversation: bool = False
    knows_tools: bool = False
    tools_introduction: ClassVar[str] = ""
    bidirectional_context: ClassVar[bool] = False
    answer_opening: str = ""
    name: ClassVar[str]

    @abstractmethod
    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """Return the conversation as text; see `Template.render`."""

    def encode_prompt(
        self, tokenizer: TextTokenizer, messages: Sequence[Message], *, generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of the rendered text, with ``[gMASK] sop`` on the tokenizer's side of it.

        Raises:
            DataError: the last message is no question, or the order does not fit.
        """
        check_last(messages, ("user",))
        text = self.render(messages, generation_prompt=generation_prompt)
        return [*tokenizer.prefix_ids, *tokenizer.text_ids(text), *tokenizer.suffix_ids]

    def encode_answer(self, tokenizer: TextTokenizer, answer: Message) -> list[int]:
        """Return the ids of the answer's text and the end id."""
        return [*tokenizer.text_ids(answer.content), tokenizer.end_id]

    def encode_conversation(
        self, tokenizer: TextTokenizer, messages: Sequence[Message]
    ) -> tuple[list[int], list[bool]]:
        """Refuse: earlier answers are part of the prompt's text here.

        Raises:
            DataError: always.
        """
        raise DataError(
            f"The template of `{tokenizer.family}` encodes earlier answers as part of the prompt, so one row "
            f"carries the loss of one answer, but a row for all {len(messages)} messages was asked for. "
            "Make one row per assistant turn."
        )

    def announce_tools(self, content: str, tools: Sequence[Mapping[str, object]]) -> Message:
        """Refuse: these releases know no tools.

        Raises:
            DataError: always.
        """
        names = ", ".join(f"`{tool.get('name')}`" for tool in tools)
        raise DataError(
            f"Template `{self.name}` knows no tools, but {names} should be announced. Drop them, or use "
            "ChatGLM3 or GLM-4."
        )

    def call_text(self, arguments: Mapping[str, object]) -> str:
        """Refuse: these releases know no tools.

        Raises:
            DataError: always.
        """
        raise DataError(
            f"Template `{self.name}` knows no tools, but one is called with {str(dict(arguments))[:60]}. "
            "Drop the call, or use ChatGLM3 or GLM-4."
        )

    def stop_ids(self, tokenizer: TextTokenizer) -> tuple[int, ...]:
        """Return the end id alone."""
        return (tokenizer.end_id,)


class ChatGLMTemplate(_TextTemplate):
    """Numbered rounds of ChatGLM-6B: rounds from 0, single line breaks, answers after ``答：``.

    A question without earlier turns is the bare question. A system message, which the release has no place
    for, stands in front as its text and a line break. The context is read in both directions, so a cache of
    an earlier turn does not hold for the next one. ChatGLM-6B knows no tools.
    """

    name: ClassVar[str] = "chatglm"
    bidirectional_context: ClassVar[bool] = True

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """Return the rounds as text, ending with ``答：`` if the last message is a question."""
        system, turns = split_system(messages, self.name)
        before = f"{system.content}\n" if system else ""
        # The released `chat` numbers rounds only where there is a history, so a first question goes in as it
        # is.
        if len(turns) == 1:
            return before + turns[0].content
        rounds: list[str] = []
        for index, message in enumerate(turns):
            if index % 2 == 0:
                rounds.append(f"[Round {index // 2}]\n问：{message.content}")
            else:
                rounds[-1] += f"\n答：{message.content}"
        after = "\n答：" if generation_prompt and len(turns) % 2 else ""
        return before + "\n".join(rounds) + after

    def encode_continuation(self, tokenizer: TextTokenizer, messages: Sequence[Message]) -> list[int]:
        """Return the prompt of a first turn; refuse later ones, whose cache does not hold.

        Raises:
            DataError: there is an earlier turn.
        """
        check_last(messages, ("user",))
        if len(messages) > 1 + (messages[0].role == "system"):
            raise DataError(
                f"The conversation of {len(messages)} messages should continue from a cache, but ChatGLM-6B "
                "reads the whole context in both directions, so every turn is a new prompt. Use "
                "`encode_prompt`."
            )
        return self.encode_prompt(tokenizer, messages)

    def clean_answer(self, text: str) -> str:
        """Strip the text, fill in the year, and write punctuation beside Chinese characters full-width."""
        return clean_chatglm(text)


class ChatGLM2Template(_TextTemplate):
    """Numbered rounds of ChatGLM2: rounds from 1, blank lines between all parts, answers after ``答：``.

    A system message, which the release has no place for, stands in front of the first round as its text
    and a blank line. ChatGLM2 knows no tools: observations and metadata are refused.
    """

    name: ClassVar[str] = "chatglm2"

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """Return the rounds as text, ending with ``答：`` if the last message is a question."""
        system, turns = split_system(messages, self.name)
        parts: list[str] = []
        for index, message in enumerate(turns):
            if index % 2 == 0:
                answered = index + 1 < len(turns)
                parts.append(f"[Round {index // 2 + 1}]\n\n问：{message.content}")
                parts[-1] += "\n\n答：" if answered or generation_prompt else ""
            else:
                parts[-1] += message.content
        before = f"{system.content}\n\n" if system else ""
        return before + "\n\n".join(parts)

    def encode_continuation(self, tokenizer: TextTokenizer, messages: Sequence[Message]) -> list[int]:
        """Return the last round; as in the release a blank line leads and the first id is dropped.

        Raises:
            DataError: the last message is no question, or the order does not fit.
        """
        check_last(messages, ("user",))
        _, turns = split_system(messages, self.name)
        if len(turns) == 1:
            return self.encode_prompt(tokenizer, messages)
        # sentencepiece puts a blank (one id) before every text, which belongs only to the start of a prompt.
        text = f"\n\n[Round {len(turns) // 2 + 1}]\n\n问：{turns[-1].content}\n\n答："
        return tokenizer.text_ids(text)[1:]

    def clean_answer(self, text: str) -> str:
        """Strip the text and fill in the year the release writes for its placeholder."""
        return clean_chatglm2(text)


class CodeGeeX2Template(_TextTemplate):
    """Plain text of CodeGeeX2, which continues what it is given: no rounds and no earlier turns.

    A system message (such as ``# language: Python``) stands in front as its text and a line break.
    """

    name: ClassVar[str] = "codegeex2"

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """Return the text to continue, and its continuation if there is one."""
        system, turns = split_system(messages, self.name)
        if len(turns) > 2:
            raise DataError(
                f"Template `codegeex2` continues one text, so it takes one user message, but {len(turns)} "
                "messages were given. Drop the earlier turns or use a chat model's template."
            )
        before = f"{system.content}\n" if system else ""
        return before + "".join(message.content for message in turns)

    def encode_continuation(self, tokenizer: TextTokenizer, messages: Sequence[Message]) -> list[int]:
        """Return the whole prompt; there are no earlier turns."""
        return self.encode_prompt(tokenizer, messages)

    def clean_answer(self, text: str) -> str:
        """Return the text as it is; leading blanks matter in code."""
        return keep_text(text)
