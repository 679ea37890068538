"""Answers as text: what the prompts of a tokenizer's template generate, decoded and cleaned as it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glmtune.inference.predict.batches import generate_ids
from glmtune.inference.settings import GenerationSettings
from glmtune.models.templates.renderer import TextTokenizer, template_for


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """One answer as text.

    Attributes:
        index: which prompt it answers.
        text: the answer, without special tokens, cleaned as the model's template says.
        stop_reason: ``eos`` or ``length``.
        num_prompt_tokens: length of the prompt.
        num_new_tokens: tokens generated, the end token included.
    """

    index: int
    text: str
    stop_reason: str
    num_prompt_tokens: int
    num_new_tokens: int


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    rows: Sequence[int] | None = None,
) -> Iterator[GeneratedAnswer]:
    """Answer prompts, yielding each batch as it finishes (not in the order of the prompts).

    Args:
        model: a causal language model, its prefix attached if there is one.
        tokenizer: its tokenizer, one of ours; end tokens and cleaning come from the template of its family.
        prompts: token ids, special prefix and generation prompt included (``Template.encode_prompt``).
        settings: how to generate.
        rows: a lasting number per prompt that fixes its random stream; its place in ``prompts`` by default.

    Yields:
        One completion per prompt.

    Raises:
        ConfigError: a prompt and its answer may not fit the model's context.
        GlmtuneError: memory does not suffice even for one row.
    """
    ours = cast("TextTokenizer", tokenizer)
    template = template_for(ours)
    stop_ids, pad_id = template.stop_ids(ours), cast("int", tokenizer.pad_token_id)
    answers = generate_ids(model, prompts, settings, stop_ids=stop_ids, pad_id=pad_id, rows=rows)
    for answer in answers:
        text = tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
        yield GeneratedAnswer(
            index=answer.index,
            text=template.clean_answer(str(text)),
            stop_reason=answer.stop_reason,
            num_prompt_tokens=answer.num_prompt_tokens,
            num_new_tokens=answer.num_new_tokens,
        )
