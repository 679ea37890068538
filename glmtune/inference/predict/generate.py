"""Answers to prompts, in token ids and as text: decoded and cleaned as the tokenizer's template says.

Greedy and sampled answers come from the request engine, row by row as they end; beams are searched by
transformers, batch by batch (`beams`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glmtune.errors import ConfigError
from glmtune.inference.engine.engine import Engine
from glmtune.inference.engine.many_prompts import GeneratedIds
from glmtune.inference.engine.model import Drafting
from glmtune.inference.engine.plain import check_engine_computes
from glmtune.inference.predict.beams import search_beams
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.settings import EngineSettings, GenerationSettings
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import TextTokenizer, template_for
from glmtune.models.templates.thinking import split_thoughts


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """One answer as text.

    Attributes:
        index: which prompt it answers.
        text: the answer, without special tokens, cleaned as the model's template says.
        stop_reason: ``eos`` or ``length``.
        num_prompt_tokens: length of the prompt.
        num_new_tokens: tokens generated, the end token included.
        is_tuned: what the switch of what was tuned decided; None: there is none.
        thoughts: what a model thought before its answer; empty: nothing.
        num_draft_tokens: see `GeneratedIds`.
        num_accepted_tokens: see `GeneratedIds`.
    """

    index: int
    text: str
    stop_reason: str
    num_prompt_tokens: int
    num_new_tokens: int
    is_tuned: bool | None = None
    thoughts: str = ""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    rows: Sequence[int] | None = None,
    draft: Drafting | None = None,
) -> Iterator[GeneratedAnswer]:
    """Answer prompts, yielding each as it ends (not in the order of the prompts).

    Args:
        model: a causal language model, its prefix attached if there is one.
        tokenizer: its tokenizer, one of ours; end tokens and cleaning come from the template of its family.
        prompts: token ids, special prefix and generation prompt included (``Template.encode_prompt``).
        settings: how to generate.
        rows: a lasting number per prompt that fixes its random stream; its place in ``prompts`` by default.
        draft: a smaller model that drafts tokens; not for beams.

    Yields:
        One completion per prompt.

    Raises:
        ConfigError: a prompt and its answer may not fit the model's context.
        GlmtuneError: memory does not suffice even for one row; the model's output is not finite.
    """
    ours = cast("TextTokenizer", tokenizer)
    template = template_for(ours)
    stop_ids, pad_id = template.stop_ids(ours), cast("int", tokenizer.pad_token_id)
    answers = generate_ids(model, prompts, settings, stop_ids=stop_ids, pad_id=pad_id, rows=rows, draft=draft)
    for answer in answers:
        text = tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
        thinks = ours.family is Family.TRANSFORMERS
        yield GeneratedAnswer(
            index=answer.index,
            text=template.clean_answer(str(text)),
            stop_reason=answer.stop_reason,
            num_prompt_tokens=answer.num_prompt_tokens,
            num_new_tokens=answer.num_new_tokens,
            is_tuned=answer.is_tuned,
            thoughts=split_thoughts(f"{template.answer_opening}{text}")[0] if thinks else "",
            num_draft_tokens=answer.num_draft_tokens,
            num_accepted_tokens=answer.num_accepted_tokens,
        )


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    rows: Sequence[int] | None = None,
    draft: Drafting | None = None,
) -> Iterator[GeneratedIds]:
    """Answer prompts given and returned as token ids.

    Which prompts are answered together changes nothing (up to rounding). The model is in evaluation mode
    meanwhile, afterwards as before; with ``compile`` its compiled parts stay compiled.

    Args:
        model: a causal language model, with the prefix, LoRA or codes that it carries.
        prompts: token ids, none empty.
        settings: how to generate.
        stop_ids: tokens that end an answer, at least one.
        pad_id: what beam search puts left of shorter prompts, masked out.
        rows: a lasting number per prompt that fixes its random stream; its place in ``prompts`` by default.
        draft: a smaller model that drafts tokens; not for beams.

    Yields:
        One answer per prompt, the longest prompts' first.

    Raises:
        ConfigError: a prompt and its answer may not fit the model's context; no compiler for ``compile``; an
            engine's thread runs the model.
        GlmtuneError: memory does not suffice even for one row; the model's output is not finite.
    """
    _check_context(model, prompts, settings)
    was_training = model.training
    model.eval()
    try:
        if settings.num_beams > 1:
            yield from search_beams(model, prompts, settings, stop_ids=stop_ids, pad_id=pad_id)
        else:
            samplings = [_sampling(settings, row) for row in rows or range(len(prompts))]
            check_engine_computes(model)
            engine = Engine(model, _engine_settings(settings), draft)
            yield from engine.complete(prompts, samplings, stop_ids=stop_ids)
    finally:
        model.train(was_training)


def _check_context(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> None:
    longest = max((len(prompt) for prompt in prompts), default=0)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest + settings.answer_tokens > context:
        raise ConfigError(
            f"`generation.max_new_tokens` is {settings.answer_tokens}, but with the longest prompt of"
            f" {longest} tokens that is {longest + settings.answer_tokens}, and the model's context is"
            f" {context} tokens."
            f" Lower it to at most {context - longest}, or shorten the prompts with `data.max_source_length`."
        )


def _engine_settings(settings: GenerationSettings) -> EngineSettings:
    return EngineSettings(
        batch_size=settings.batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        # What prompts share is never kept as codes. So a row's answer would depend on which others are left
        # to answer, and a run that goes on would answer otherwise than one never stopped.
        share_prefixes=settings.kv_cache == "plain",
        kv_cache=settings.kv_cache,
        compile=settings.compile,
        prompt_lookup_tokens=settings.prompt_lookup_tokens,
    )


def _sampling(settings: GenerationSettings, row: int) -> Sampling:
    """Return how the tokens of a row are chosen; its random numbers are those of (seed, row) alone.

    `run_identity.DRAWING` numbers the way from seed and row to tokens: count it up if that changes.
    """
    if not settings.do_sample:
        return Sampling(max_new_tokens=settings.answer_tokens, repetition_penalty=settings.repetition_penalty)
    temperature, top_k, top_p = settings.sampling
    # Mixed, as the streams of neighbouring seeds or rows would otherwise be the same, one row further.
    [seed] = np.random.SeedSequence([settings.seed, row]).generate_state(1, np.uint64).tolist()
    return Sampling(
        max_new_tokens=settings.answer_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=settings.repetition_penalty,
        seed=seed,
    )
