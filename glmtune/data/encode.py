"""Turn conversations into ids and labels, shortened turn by turn where they are too long.

The official script cuts the prompt's ids at ``max_source_length`` and so loses ``答：`` or the question
itself, and the model learns to answer nothing. Here text is left out before it is encoded, in this order:

    system message | oldest turns | tool results of the current turn | question | 答：
    stays            go first       then these, cut at their ends       then it   stays

Limits that are null cut nothing: `glmtune.data.lengths` puts numbers in their place, which the data tells.
Prompts that fit are those of the official script, id by id; so are its limits: ``sop`` of ChatGLM-6B, which
its script puts on the answer's side, counts as a token of the answer.

Source:
    ``ptuning/main.py`` of THUDM/ChatGLM-6B and THUDM/ChatGLM2-6B (`preprocess_function_train`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from glmtune.data.records import Conversation, RowProblem
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError, DataError
from glmtune.labels import IGNORE_INDEX
from glmtune.messages import Message
from glmtune.models.templates.renderer import Template, TextTokenizer, template_for
from glmtune.models.templates.thinking import CLOSE, has_thoughts
from glmtune.models.templates.tool_calls import write_tools

Returned = TypeVar("Returned")


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row to train on, and what was cut to make it fit.

    Attributes:
        input_ids: prompt ids, answer ids, end id; ``[S]``.
        labels: the same where loss is taken, −100 elsewhere; ``[S]``.
        dropped_turns: oldest turns left out (a turn is a question with everything up to the next question).
        cut_question_tokens: tokens cut off the end of the current question.
        cut_answer_tokens: tokens cut off the end of the answer.
        is_desirable: whether its answer is one to give more often; False for the worse one of a pair.
    """

    input_ids: list[int]
    labels: list[int]
    dropped_turns: int = 0
    cut_question_tokens: int = 0
    cut_answer_tokens: int = 0
    is_desirable: bool = True


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A prompt of at most ``max_source_length`` tokens.

    Attributes:
        input_ids: its ids, generation prompt included; ``[S]``.
        messages: the messages that are left.
        dropped_turns: as in `EncodedRow`.
        cut_question_tokens: as in `EncodedRow`.
    """

    input_ids: list[int]
    messages: tuple[Message, ...]
    dropped_turns: int = 0
    cut_question_tokens: int = 0


def encode_training_row(
    tokenizer: TextTokenizer, conversation: Conversation, settings: DataSettings
) -> list[EncodedRow]:
    """Encode a conversation for training.

    Args:
        tokenizer: a GLM tokenizer; it decides the template.
        conversation: ends with an answer; an answer alone is plain text, learnt from its first token.
        settings: lengths, source prefix and which turns are learnt.

    Returns:
        One row; with ``loss_on="all_turns"`` one row per answer, if the template encodes earlier answers
        differently from the answer being learnt (ChatGLM2). Of a preference pair two: the better answer's,
        then the worse one's, both to the same tokens of a prompt.

    Raises:
        ConfigError: a setting that the model's way of reading its context excludes.
        RowProblem: the row does not fit the template, or not even its fixed parts fit ``max_source_length``.
    """
    if conversation.rejected is not None or conversation.desirable is not None:
        return _judged_rows(tokenizer, conversation, settings)
    template = template_for(tokenizer)
    refuse_settings(template, settings)
    messages = _refusable(lambda: write_tools(template, conversation.messages))
    learnt = messages if settings.loss_on == "all_turns" else messages[-1:]
    if not any(message.role == "assistant" and message.has_loss for message in learnt):
        raise RowProblem(
            f"nothing of it is learnt: `loss` or `weight` leaves out every answer of `data.loss_on` = "
            f"`{settings.loss_on}`. If earlier answers are to be learnt, use data.loss_on=all_turns; "
            "otherwise delete the row."
        )
    if settings.loss_on != "all_turns" or template.one_row_per_conversation:
        return [_training_row(tokenizer, template, messages, settings)]
    ends = [
        end
        for end, message in enumerate(messages, start=1)
        if message.role == "assistant" and message.has_loss
    ]
    return [_training_row(tokenizer, template, messages[:end], settings) for end in ends]


def _judged_rows(
    tokenizer: TextTokenizer, conversation: Conversation, settings: DataSettings
) -> list[EncodedRow]:
    plain = replace(conversation, rejected=None, desirable=None)
    [row] = encode_training_row(tokenizer, plain, settings)
    if conversation.rejected is None:
        return [replace(row, is_desirable=bool(conversation.desirable))]
    worse = replace(plain, messages=(*plain.messages[:-1], conversation.rejected))
    [other] = encode_training_row(tokenizer, worse, settings)
    if row.input_ids == other.input_ids:
        raise RowProblem(
            f"its two answers are the same: what tells them apart lies behind `data.max_target_length` ="
            f" {settings.max_target_length}, or is not a token. Raise max_target_length, or delete the row."
        )
    return [row, replace(other, is_desirable=False)]


def encode_prompt_row(
    tokenizer: TextTokenizer, conversation: Conversation, settings: DataSettings
) -> FittedPrompt:
    """Encode what comes before the last answer, to generate from.

    Args:
        tokenizer: a GLM tokenizer; it decides the template.
        conversation: with or without a reference answer at its end.
        settings: ``max_source_length`` and the source prefix.

    Returns:
        The prompt; equal to the prompt part of the training row.

    Raises:
        RowProblem: as `encode_training_row`.
    """
    template = template_for(tokenizer)
    messages = _refusable(lambda: write_tools(template, conversation.prompt))
    return truncate_prompt(tokenizer, template, messages, settings)


def encode_reference_row(tokenizer: TextTokenizer, answer: str, max_target_length: int) -> list[int]:
    """Encode a reference answer as the official evaluation does before it decodes and scores it.

    Args:
        tokenizer: a GLM tokenizer.
        answer: the reference.
        max_target_length: most tokens, those that start every input included.

    Returns:
        The ids of the answer, cut so that they fit with ``[gMASK] sop`` on the tokenizer's side of them.

    Source:
        THUDM/ChatGLM-6B and THUDM/ChatGLM2-6B, ptuning/main.py, ``preprocess_function_eval``.
    """
    before, after = tokenizer.prefix_ids, tokenizer.suffix_ids
    room = max(0, max_target_length - len(before) - len(after))
    return [*before, *tokenizer.text_ids(answer)[:room], *after]


def refuse_settings(template: Template, settings: DataSettings) -> None:
    """Refuse what would show a model that reads its context in both directions what it is to predict.

    Args:
        template: of the tokenizer.
        settings: of the data.

    Raises:
        ConfigError: there is such a setting.
    """
    if not template.bidirectional_context:
        return
    if settings.loss_on == "everything":
        raise ConfigError(
            "`data.loss_on` is `everything`, but ChatGLM-6B reads its context in both directions, so there "
            "is nothing to predict in a prompt. Use `answer` or `all_turns`."
        )
    if settings.packing:
        raise ConfigError(
            "`data.packing` is true, but ChatGLM-6B reads everything before the first `sop` of a row as one "
            "context, so samples in one row would see each other. Set data.packing=false; batches are padded "
            "to their longest row, and `trainer.group_by_length` keeps padding small."
        )


def _training_row(
    tokenizer: TextTokenizer, template: Template, messages: Sequence[Message], settings: DataSettings
) -> EncodedRow:
    prompt = FittedPrompt([*tokenizer.prefix_ids, *tokenizer.suffix_ids], ())
    if len(messages) > 1:
        prompt = truncate_prompt(tokenizer, template, messages[:-1], settings)
    *answer, end = _refusable(lambda: template.encode_answer(tokenizer, messages[-1]))
    # ChatGLM-6B's script counts `sop` and the end token in max_target_length, ChatGLM2's neither.
    limit = len(answer)
    if settings.max_target_length is not None:
        limit = max(0, settings.max_target_length - 2 * template.bidirectional_context)
    kept = [*answer[:limit], end]
    labels = [IGNORE_INDEX] * len(prompt.input_ids)
    if template.bidirectional_context:
        labels[-1] = prompt.input_ids[-1]  # `sop`: predicted from gMASK, so the answer's first token
    if settings.loss_on == "all_turns" and template.one_row_per_conversation and prompt.messages:
        whole = _with_source_prefix([*prompt.messages, messages[-1]], settings.source_prefix)
        # A cut answer is shorter than the conversation's ids; labels are needed for the prompt's part alone.
        ids, learnt = template.encode_conversation(tokenizer, whole)
        assert ids == [*prompt.input_ids, *answer, end], "a conversation is its last prompt and answer"
        labels = [
            token if loss else IGNORE_INDEX for token, loss in zip(prompt.input_ids, learnt, strict=False)
        ]
    if settings.loss_on == "everything":
        labels = prompt.input_ids
    answered = kept if messages[-1].has_loss else [IGNORE_INDEX] * len(kept)
    if not settings.loss_on_thoughts:
        labels = without_thoughts(tokenizer, template, labels)
        answered = without_thoughts(tokenizer, template, answered)
        if all(label == IGNORE_INDEX for label in (*labels, *answered)):
            raise RowProblem(
                "nothing of it is learnt: `data.loss_on_thoughts` is false, and `data.max_target_length` ="
                f" {settings.max_target_length} cuts its answer within the thoughts. Raise max_target_length,"
                " or delete the row."
            )
    return EncodedRow(
        input_ids=[*prompt.input_ids, *kept],
        labels=[*labels, *answered],
        dropped_turns=prompt.dropped_turns,
        cut_question_tokens=prompt.cut_question_tokens,
        cut_answer_tokens=max(0, len(answer) - limit),
    )


def without_thoughts(tokenizer: TextTokenizer, template: Template, labels: Sequence[int]) -> list[int]:
    """Take the loss off the thoughts of every answer, the token that completes the closing tag included.

    Args:
        tokenizer: a GLM tokenizer.
        template: its prompt rules.
        labels: of answers, −100 between them.

    Returns:
        As many labels. An answer that ends within its thoughts is all thoughts.
    """
    found = list(labels)
    end = 0
    while end < len(found):
        start = next((at for at in range(end, len(found)) if found[at] != IGNORE_INDEX), len(found))
        end = next((at for at in range(start, len(found)) if found[at] == IGNORE_INDEX), len(found))
        answer = found[start:end]

        def text(length: int, answer: Sequence[int] = answer) -> str:
            decoded: str = cast("Any", tokenizer).decode(answer[:length], skip_special_tokens=False)
            return template.answer_opening + decoded

        if answer and has_thoughts(text(len(answer))):
            # Where the tag is complete, by halving: what follows a complete tag does not take it apart again.
            last = bisect_left(range(len(answer)), True, key=lambda n, text=text: CLOSE in text(n))
            found[start : start + last] = [IGNORE_INDEX] * last
    return found


def truncate_prompt(
    tokenizer: TextTokenizer, template: Template, messages: Sequence[Message], settings: DataSettings
) -> FittedPrompt:
    """Encode a prompt, dropping the oldest turns and then the end of the question until it fits.

    The system message, the template around the question and the generation prompt always stay; the turns left
    are numbered anew. A prompt that fits is encoded unchanged.

    Args:
        tokenizer: a GLM tokenizer.
        template: its prompt rules.
        messages: ending with the message to answer.
        settings: ``max_source_length`` and the source prefix.

    Returns:
        The prompt and what was left out.

    Raises:
        RowProblem: the messages do not fit the template, or its fixed parts alone exceed the limit.
    """
    limit = settings.max_source_length

    def encode(some: Sequence[Message]) -> list[int]:
        return _refusable(lambda: _prompt_ids(tokenizer, template, some, settings.source_prefix))

    def size(some: Sequence[Message]) -> int:
        return len(encode(some)) - template.bidirectional_context  # `sop` counts as a token of the answer

    ids = encode(messages)
    if limit is None or len(ids) - template.bidirectional_context <= limit:
        return FittedPrompt(ids, tuple(messages))
    system, turns = _split_turns(messages)
    # At least one turn goes and the last one stays, so the search runs from 1 to ``last``; bisection, because
    # every try encodes the conversation anew (turns left are numbered anew, so lengths do not simply add up).
    last = len(turns) - 1
    dropped = min(
        last,
        bisect_left(range(last), True, lo=1, key=lambda n: size([*system, *_joined(turns[n:])]) <= limit),
    )
    left = [*system, *_joined(turns[dropped:])]
    ids = encode(left)
    if size(left) <= limit:
        return FittedPrompt(ids, tuple(left), dropped)
    shortened = _shorten_question(size, left, limit)
    cut_ids = encode(shortened)
    return FittedPrompt(cut_ids, tuple(shortened), dropped, len(ids) - len(cut_ids))


def _refusable(encode: Callable[[], Returned]) -> Returned:
    """Turn the template's refusal of a conversation into a problem of its row."""
    try:
        return encode()
    except DataError as error:
        raise RowProblem(str(error)) from None


def _prompt_ids(
    tokenizer: TextTokenizer, template: Template, messages: Sequence[Message], source_prefix: str
) -> list[int]:
    if not source_prefix:
        return template.encode_prompt(tokenizer, messages)
    if template.one_row_per_conversation:
        return template.encode_prompt(tokenizer, _with_source_prefix(messages, source_prefix))
    # As in the official script the prefix stands before the whole prompt text, `[Round 1]` included.
    text_ids = tokenizer.text_ids(source_prefix + template.render(messages))
    return [*tokenizer.prefix_ids, *text_ids, *tokenizer.suffix_ids]


def _with_source_prefix(messages: Sequence[Message], source_prefix: str) -> list[Message]:
    """Put the prefix before the first question, where a template has no text in front of it."""
    first = next(index for index, message in enumerate(messages) if message.role == "user")
    question = replace(messages[first], content=source_prefix + messages[first].content)
    return [*messages[:first], question, *messages[first + 1 :]]


def _split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    system = [message for message in messages[:1] if message.role == "system"]
    turns: list[list[Message]] = []
    for message in messages[len(system) :]:
        if message.role == "user":
            turns.append([])
        turns[-1].append(message)
    return system, turns


def _joined(turns: Sequence[Sequence[Message]]) -> list[Message]:
    return [message for turn in turns for message in turn]


def _shorten_question(
    size: Callable[[Sequence[Message]], int], messages: Sequence[Message], limit: int
) -> list[Message]:
    """Cut tool results (latest first) and then the question at their ends, as little as possible."""
    # The tool's result goes before the question: it is long and can be asked for again. One character of each
    # stays, because some templates leave empty messages out, which would be another conversation.
    shortened = list(messages)
    for index in [i for i in reversed(range(len(messages))) if messages[i].role in ("observation", "user")]:

        def fits(length: int, index: int = index) -> bool:
            shortened[index] = replace(messages[index], content=messages[index].content[:length])
            return size(shortened) <= limit

        longest = _longest_that(fits, limit, len(messages[index].content))
        shortened[index] = replace(messages[index], content=messages[index].content[: max(1, longest)])
        if longest:
            return shortened
    fixed = size(shortened) - 1
    raise RowProblem(
        f"the prompt cannot be shortened to `data.max_source_length` = {limit} tokens: the template, the"
        f" system message and what must stay of the current turn take {fixed} tokens without the question."
        f" Raise data.max_source_length above {fixed}, or shorten the system message."
    )


def _longest_that(fits: Callable[[int], bool], guess: int, high: int) -> int:
    """Return the largest length from 1 to ``high`` that fits, 0 if none does; starts near ``guess``."""
    low, upper = 0, min(guess, high)
    while upper < high and fits(upper):  # doubled first: a question may be a book, and every try encodes it
        low, upper = upper, min(2 * upper, high)
    return bisect_left(range(1, upper + 1), True, lo=low, key=lambda length: not fits(length))
