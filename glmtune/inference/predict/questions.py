"""From conversations to questions for a model: the prompt, and the reference to score the answer against."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedTokenizerBase

from glmtune.data.conversations import ConversationSet
from glmtune.data.encode import encode_prompt_row, encode_reference_row
from glmtune.data.records import BadRow, Conversation, RowProblem, bad_rows_error
from glmtune.data.settings import DataSettings
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import TextTokenizer, template_for
from glmtune.models.templates.thinking import has_thoughts, split_thoughts
from glmtune.models.templates.tool_calls import write_tools


@dataclass(frozen=True, slots=True)
class Question:
    """One row to answer.

    Attributes:
        row: 0-based place of the row among the usable rows of its split.
        prompt: the prompt as a person reads it.
        input_ids: the prompt as the model reads it.
        reference: the text to score against, cut as the official evaluation does; None if there is none.
        full_reference: the uncut reference, where cutting changed it.
        dropped_turns: oldest turns left out of the prompt.
        cut_question_tokens: tokens cut off the end of the question.
        cut_answer_tokens: tokens cut off the end of the reference.
    """

    row: int
    prompt: str
    input_ids: tuple[int, ...]
    reference: str | None
    full_reference: str | None
    dropped_turns: int = 0
    cut_question_tokens: int = 0
    cut_answer_tokens: int = 0


def build_questions(
    tokenizer: PreTrainedTokenizerBase, loaded: ConversationSet, settings: DataSettings
) -> list[Question]:
    """Encode the rows of a split to generate from.

    Args:
        tokenizer: one of ours; it decides the template.
        loaded: the conversations; the last answer of each, if there is one, becomes the reference.
        settings: lengths, source prefix, and what a row that does not fit does.

    Returns:
        One question per row that fits, in order; with ``on_bad_row="skip"`` others are left out.

    Raises:
        DataError: rows that cannot be made to fit; all of them are reported.
    """
    questions: list[Question] = []
    bad: list[BadRow] = []
    for conversation in loaded.conversations:
        try:
            questions.append(_question(tokenizer, len(questions), conversation, settings))
        except RowProblem as problem:
            path = "" if conversation.path == loaded.path else conversation.path
            bad.append(BadRow(conversation.line, str(problem), path=path))
    if bad and (settings.on_bad_row == "error" or not questions):
        raise bad_rows_error(loaded.path, bad, len(loaded.conversations))
    return questions


def _question(
    tokenizer: PreTrainedTokenizerBase, row: int, conversation: Conversation, settings: DataSettings
) -> Question:
    ours = cast("TextTokenizer", tokenizer)
    fitted = encode_prompt_row(ours, conversation, settings)
    if settings.source_prefix:
        prompt = str(tokenizer.decode(fitted.input_ids, skip_special_tokens=True))
    else:
        prompt = template_for(ours).render(fitted.messages)
    answer = conversation.answer
    if answer is not None:
        answer = write_tools(template_for(ours), [answer])[0]
        if ours.family is Family.TRANSFORMERS and has_thoughts(answer.content):
            answer = replace(answer, content=split_thoughts(answer.content)[1])  # thoughts are not scored
    reference, num_cut = None, 0
    if answer is not None:
        whole = _no_limit(answer.content)
        limit = whole if settings.max_target_length is None else settings.max_target_length
        reference = cut_reference(tokenizer, answer.content, limit)
        # Counted, as cleaning may change a reference that fits, and that has lost nothing.
        num_cut = max(0, len(encode_reference_row(ours, answer.content, whole)) - limit)
    was_cut = answer is not None and reference != answer.content.strip()
    return Question(
        row=row,
        prompt=prompt,
        input_ids=tuple(fitted.input_ids),
        reference=reference,
        full_reference=answer.content if answer is not None and was_cut else None,
        dropped_turns=fitted.dropped_turns,
        cut_question_tokens=fitted.cut_question_tokens,
        cut_answer_tokens=num_cut,
    )


def _no_limit(text: str) -> int:
    # A token is at least a byte, so this limit cuts nothing; 64 leaves room for the tokens in front.
    return len(text.encode("utf-8", "backslashreplace")) + 64


def cut_reference(tokenizer: PreTrainedTokenizerBase, reference: str, max_target_length: int) -> str:
    """Cut a reference to so many tokens and decode it again, as the official evaluation does.

    The tokens in front of every input (``[gMASK] sop``) count, so ChatGLM2 keeps 62 of 64. Where decoding
    would lose characters that the tokenizer does not know, the reference is cut between characters instead,
    so that a poor vocabulary does not make the task easier.

    Args:
        tokenizer: one of ours.
        reference: the whole answer.
        max_target_length: tokens, those in front included.

    Returns:
        The text to score against, blanks at its ends removed.

    Source:
        THUDM/ChatGLM2-6B, ptuning/main.py, ``preprocess_function_eval`` and ``compute_metrics``.
    """
    ours = cast("TextTokenizer", tokenizer)
    whole = encode_reference_row(ours, reference, _no_limit(reference))
    if tokenizer.unk_token_id in whole[len(ours.prefix_ids) :]:

        def fits(length: int) -> bool:
            return (
                len(encode_reference_row(ours, reference[:length], max_target_length + 1))
                <= max_target_length
            )

        # Longest first, so that `fits` goes from False to True; no length at all fits without asking.
        longest = len(reference)
        return reference[: longest - bisect_left(range(longest, 0, -1), True, key=fits)].strip()
    cut = encode_reference_row(ours, reference, max_target_length)
    text = str(tokenizer.decode(cut, skip_special_tokens=True)).strip()
    template = template_for(ours)
    # Answers are cleaned before they are scored; roles' clean-up would take a first line for a tool's name.
    return text if template.knows_tools else template.clean_answer(text)
