"""Prompts of an evaluation as ids: the template, ``[gMASK] sop``, and the token of a choice.

The part of a backend that must not depend on who computes: ``glm.py`` and ``vllm_engine.py`` send the same
ids, so that their results differ by arithmetic only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import cast

from transformers import PreTrainedTokenizerBase

from evaluation.extraction.text import cut_at
from evaluation.sample import Completion, Prompt
from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.models.templates.folder import FolderTemplate
from glmtune.models.templates.renderer import TextTokenizer, template_for
from glmtune.models.templates.thinking import CLOSE

ENCODED_PROMPTS = 16384
"""Prompts whose ids are remembered: a runner counts a prompt's tokens before it has it answered."""
REMEMBERED_CHARS = 32_768
"""Of a prompt at most: the ids of thousands of longer ones would fill the memory."""


class PromptEncoder:
    """Turns prompts into ids by the model's template; also finds the token of a choice.

    Attributes:
        family: the release.
        stop_ids: tokens that end a completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None) -> None:
        """Take a tokenizer of ours.

        Args:
            tokenizer: decides the template.
            system: system message of conversations that begin with none, as a tuned model knows it.
        """
        self._system = [Message("system", system)] if system is not None else []
        self._tokenizer = tokenizer
        self._ours = cast("TextTokenizer", tokenizer)
        self._template = template_for(self._ours)
        self.family = self._ours.family
        self.stop_ids = self._template.stop_ids(self._ours)
        # An instance of its own for every encoder: a cache on the method would keep encoders alive.
        self._remembered = lru_cache(ENCODED_PROMPTS)(self._ids)

    @property
    def vocabulary_hash(self) -> str:
        """What tells two vocabularies apart: the same text is other ids in another one."""
        listed = json.dumps(sorted(self._tokenizer.get_vocab().items()))
        return hashlib.sha256(listed.encode()).hexdigest()[:16]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return generated ids as text, without special tokens, not stripped or cleaned."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def opens_thoughts(self, prompt: Prompt) -> bool:
        """Whether the model goes on with thoughts behind a prompt: it ends with their tag."""
        return prompt.text is None and bool(self._template.answer_opening)

    def completed(self, prompt: Prompt, completion: Completion, stop: Sequence[str]) -> Completion:
        """Return a completion as the model's own words, the tag of thoughts in front where the prompt has it.

        Without it a completion that was cut within its thoughts would be read as an answer. There, texts that
        end an answer are looked for behind the thoughts alone, so the model is to be asked without them.

        Args:
            prompt: what was completed.
            completion: as decoded.
            stop: texts that end an answer.
        """
        if not self.opens_thoughts(prompt):
            return completion
        text = f"{self._template.answer_opening}{completion.text}"
        thoughts, close, answer = text.partition(CLOSE)
        cut = cut_at(answer, stop)
        if cut == answer:
            return dataclasses.replace(completion, text=text)
        return dataclasses.replace(completion, text=f"{thoughts}{close}{cut}", stop_reason="stop")

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template: a folder in transformers' format may have none."""
        return not isinstance(self._template, FolderTemplate) or self._template.source is not None

    def plain_ids(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of ``[gMASK] sop``, and those of a text that follows them."""
        return [*self._ours.prefix_ids, *self._ours.suffix_ids], self._ours.text_ids(text)

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the ids of a prompt; those of the latest are remembered, unless they are long.

        Args:
            prompt: text or turns.

        Raises:
            DataError: turns that the template cannot show, or special tokens that are not there exactly once.
        """
        length = len(prompt.text or "") + sum(len(turn.content) for turn in prompt.turns)
        return self._ids(prompt) if length > REMEMBERED_CHARS else self._remembered(prompt)

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Encode a prompt.

        Raises:
            DataError: turns that the template cannot show, or special tokens that are not there exactly once.
        """
        if prompt.text is None:
            before = [] if prompt.turns[0].role == "system" else self._system
            ids = self._template.encode_prompt(self._ours, [*before, *prompt.turns])
            if self.family is Family.TRANSFORMERS:  # its own template decides (GLM-Edge writes none)
                return tuple(ids)
        else:
            ids = [*self._ours.prefix_ids, *self._ours.text_ids(prompt.text), *self._ours.suffix_ids]
        check_marks(ids, [*self._ours.prefix_ids, *self._ours.suffix_ids])
        return tuple(ids)

    def choice_ids(self, prompt: Prompt, choices: Sequence[str]) -> tuple[tuple[int, ...], list[int]]:
        """Find the token of each choice after a prompt.

        The ids of a letter are not looked up by themselves: `A` and ` A` are two tokens, and which of them a
        model would write depends on what stands before. So the prompt is encoded together with each choice,
        and the last id is taken, provided that everything before it is the same for all.

        Args:
            prompt: the question.
            choices: strings as they follow it.

        Returns:
            The ids that stand before every choice (the prompt's, and what all answers begin with), and the
            one id of each choice.

        Raises:
            DataError: a choice is no single token there, or two choices are the same one.
        """
        answered = [self._answered(prompt, choice) for choice in choices]
        context, lasts = answered[0][:-1], [ids[-1] for ids in answered]
        for choice, ids in zip(choices, answered, strict=True):
            if ids[:-1] != context:
                raise DataError(
                    f"The choice {choice!r} must be one token after the prompt, but after"
                    f" {_ending(prompt)!r} the tokens of the choices are {_differing(answered)}. Drop blanks"
                    " at the end of the prompt, or write the choice as the model would (` A` or `A`)."
                )
        if len(set(lasts)) < len(lasts):
            raise DataError(
                f"The choices {', '.join(map(repr, choices))} must differ in their token, but their ids after"
                f" the prompt are {lasts}. Give choices that the tokenizer tells apart."
            )
        return context, lasts

    def _answered(self, prompt: Prompt, choice: str) -> tuple[int, ...]:
        """Encode a prompt followed by a choice, without the end token."""
        if prompt.text is None:
            answer = self._template.encode_answer(self._ours, Message("assistant", choice))[:-1]
            return (*self.ids(prompt), *answer)
        if self._ours.suffix_ids:  # ChatGLM-6B: the answer stands behind [gMASK] sop
            return (*self.ids(prompt), *self._ours.text_ids(choice))
        return (*self._ours.prefix_ids, *self._ours.text_ids(prompt.text + choice))


def check_marks(token_ids: Sequence[int], marks: Sequence[int]) -> None:
    """Raise DataError unless each of the marks (``[gMASK] sop``) is in a prompt exactly once."""
    counts = [list(token_ids).count(mark) for mark in marks]
    if any(count != 1 for count in counts):
        raise DataError(
            f"A prompt must hold [gMASK] and sop (ids {list(marks)}) exactly once, but this one holds them"
            f" {counts} times. Give the text without special tokens; the backend adds them."
        )


def is_chat_model(name: str, family: Family, *, has_template: bool = True) -> bool:
    """Decide whether a model was tuned for conversations: by its name, or by its folder's chat template.

    Args:
        name: of the model or its folder.
        family: the release.
        has_template: a folder in transformers' format brings a chat template along.

    >>> is_chat_model("chatglm3-6b", Family.CHATGLM3), is_chat_model("chatglm3-6b-base", Family.CHATGLM3)
    (True, False)
    >>> is_chat_model("glm-4-9b", Family.GLM4), is_chat_model("glm-4-9b-chat-1m", Family.GLM4)
    (False, True)
    """
    if family is Family.TRANSFORMERS:
        return has_template
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    if family is Family.CODEGEEX2 or re.search(r"(^|[-_])base($|[-_])", last):
        return False
    return family is not Family.GLM4 or "chat" in last


def _ending(prompt: Prompt) -> str:
    return (prompt.text if prompt.text is not None else prompt.turns[-1].content)[-20:]


def _differing(answered: Sequence[tuple[int, ...]]) -> str:
    """Show the last ids of each answered prompt, from the first place on at which any two differ."""
    start = 0
    while all(len(ids) > start and ids[start] == answered[0][start] for ids in answered):
        start += 1
    return ", ".join(str(list(ids[start:])) for ids in answered)
