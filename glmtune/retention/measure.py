"""How much a tuned model still answers as its base: identical answers, KL per token, leaks of the task.

Two passes, of which the second is often short:

    read      the tuned model reads the base's answers (`distributions`): KL, and whether it would give this
              very answer
    answer    where it would not, it answers greedily itself: what it says instead, and whether that is in
              the style of the task (`style`)

An answer whose every token the model finds the likeliest is its greedy answer, so nothing has to be generated
for it. A model that kept everything costs one forward pass over all answers; one that kept nothing, as many
generated tokens as the base's answers took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glmtune.inference.predict.generate import generate_ids
from glmtune.inference.settings import GenerationSettings
from glmtune.models.templates.renderer import TextTokenizer, template_for
from glmtune.retention.base_answers import BaseAnswers
from glmtune.retention.distributions import BaseDistributions, read_base_answers
from glmtune.retention.style import TaskStyle

Advance = Callable[[int], None]
"""Called with how many answers are settled by now."""


@dataclass(frozen=True, slots=True)
class TunedAnswer:
    """What a tuned model answers where the base's answer is known.

    Attributes:
        index: which prompt.
        text: the answer as it is shown.
        is_identical: whether it is the base's, token by token.
        kl_nats: KL(base || tuned) per token of the base's answer; a lower bound, see `distributions`.
        num_tokens: tokens of the base's answer, which the KL is a mean over.
        leaks: whether it is another answer than the base's, and in the style of the task.
        is_off: whether a switch left the prompt to the base, so that the answer is the base's by definition.
    """

    index: int
    text: str
    is_identical: bool
    kl_nats: float
    num_tokens: int
    leaks: bool
    is_off: bool = False


@dataclass(frozen=True, slots=True)
class Retention:
    """What is left of a base's answers, over all prompts.

    Attributes:
        num_prompts: prompts asked.
        kept_frac: share of answers that are the base's, token by token.
        kl_nats: mean over all tokens of the base's answers.
        leak_frac: share of answers in the style of the task.
        off_frac: share of prompts that a switch left to the base.
    """

    num_prompts: int
    kept_frac: float
    kl_nats: float
    leak_frac: float
    off_frac: float


@dataclass(frozen=True)
class Base:
    """Everything known of a base that a tuned model is measured against.

    Attributes:
        answers: its own.
        distributions: along them.
        style: tells answers of the task from them.
    """

    answers: BaseAnswers
    distributions: BaseDistributions
    style: TaskStyle

    @property
    def rows(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer of each, token ids."""
        return list(zip(self.answers.prompt_ids, self.answers.answer_ids, strict=True))


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Base,
    which: Sequence[int],
    *,
    max_new_tokens: int,
    batch_size: int,
    advance: Advance = lambda count: None,
) -> list[TunedAnswer]:
    """Measure a tuned model at some prompts; random numbers are neither drawn nor changed.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        base: what it was before tuning.
        which: numbers of the prompts; several processes ask a part each.
        max_new_tokens: of the base's answers, the token that ends one included.
        batch_size: rows in one forward pass over whole answers.
        advance: told how far it is.

    Returns:
        One per prompt of ``which``, in its order.

    Raises:
        GlmtuneError: memory does not suffice even for one row; the model's output is not finite.
    """
    pad_token_id = cast(int, tokenizer.pad_token_id)
    readings = {
        reading.index: reading
        for reading in read_base_answers(
            model,
            base.rows,
            base.distributions,
            which=which,
            pad_token_id=pad_token_id,
            batch_size=batch_size,
        )
    }
    other = [index for index in which if not readings[index].is_greedy]
    advance(len(which) - len(other))
    given = _greedy_answers(
        model, tokenizer, base, other, max_new_tokens, lambda count: advance(len(which) - len(other) + count)
    )
    found: list[TunedAnswer] = []
    for index in which:
        answer_ids = base.answers.answer_ids[index]
        # Not among the given: the base's answer was found to be this model's greedy one, too.
        ids, text = given.get(index, (answer_ids, base.answers.texts[index]))
        found.append(
            TunedAnswer(
                index=index,
                text=text,
                is_identical=ids == answer_ids,
                kl_nats=readings[index].kl_nats / len(answer_ids),
                num_tokens=len(answer_ids),
                leaks=ids != answer_ids and base.style.is_of_task(text),
            )
        )
    return found


def left_to_base(base: Base, which: Iterable[int]) -> list[TunedAnswer]:
    """Return the answers to prompts that a switch leaves to the base: the base's own, nothing is computed.

    Args:
        base: what the model was before tuning.
        which: numbers of the prompts.
    """
    answers = base.answers
    return [
        TunedAnswer(
            index=index,
            text=answers.texts[index],
            is_identical=True,
            kl_nats=0.0,
            num_tokens=len(answers.answer_ids[index]),
            leaks=False,
            is_off=True,
        )
        for index in which
    ]


def _greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Base,
    which: Sequence[int],
    max_new_tokens: int,
    advance: Advance,
) -> dict[int, tuple[list[int], str]]:
    """Answer prompts; ids with the token that ended them, and text, by number of the prompt."""
    ours = cast("TextTokenizer", tokenizer)
    template = template_for(ours)
    made = generate_ids(
        model,
        [base.answers.prompt_ids[index] for index in which],
        GenerationSettings(max_new_tokens=max_new_tokens),
        stop_ids=template.stop_ids(ours),
        pad_id=cast(int, tokenizer.pad_token_id),
    )
    found: dict[int, tuple[list[int], str]] = {}
    for answer in made:
        ended = [] if answer.stop_id is None else [answer.stop_id]
        ids = [*answer.token_ids, *ended]
        text: Any = tokenizer.decode(ids, skip_special_tokens=True)
        found[which[answer.index]] = ids, template.clean_answer(str(text))
        advance(len(found))
    return found


def summarize(answers: Sequence[TunedAnswer]) -> Retention:
    """Put the answers to all prompts into numbers.

    Args:
        answers: at least one.
    """
    count, num_tokens = len(answers), sum(answer.num_tokens for answer in answers)
    return Retention(
        num_prompts=count,
        kept_frac=sum(answer.is_identical for answer in answers) / count,
        kl_nats=sum(answer.kl_nats * answer.num_tokens for answer in answers) / num_tokens,
        leak_frac=sum(answer.leaks for answer in answers) / count,
        off_frac=sum(answer.is_off for answer in answers) / count,
    )
