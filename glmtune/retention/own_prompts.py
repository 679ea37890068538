"""Prompts that a chat model thinks up itself: sampled after the opening of a user's turn.

A chat model was trained on whole conversations, so what it writes where a user would speak is what it expects
to be asked. Nobody has to collect prompts then, in whatever language the model knows.
"""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glmtune.errors import ConfigError
from glmtune.inference.settings import GenerationSettings
from glmtune.messages import Message
from glmtune.models.templates.renderer import TextTokenizer, template_for
from glmtune.retention.base_answers import BATCH_SIZE, generate_together
from glmtune.retention.prompts import Prompt

NUM_SAMPLED = 768
"""Drawn, so that some 600 are left: empty ones, those cut short and those drawn twice go."""
MAX_TOKENS = 64
"""Longest prompt; one that has not ended by then is half a question, and goes."""
FEWEST = 16
_SAMPLES = ("a", "1", "好")


def sample_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    num_sampled: int = NUM_SAMPLED,
    share: bool = True,
    progress: str = "",
) -> list[Prompt]:
    """Let a model think up prompts. A collective: all processes call it and get the same prompts.

    Every prompt has random numbers of its own, of the seed and its place, so the prompts depend neither on
    batches nor on the number of processes, and the random numbers of training stay as they were.

    Args:
        model: the base, what is tuned turned off.
        tokenizer: its tokenizer; it decides the template.
        seed: of the sampling.
        num_sampled: how many are drawn; fewer are left.
        share: see `glmtune.retention.base_answers.make_answers`.
        progress: likewise.

    Returns:
        Different prompts, in the order in which they were drawn.

    Raises:
        ConfigError: the release has no mark around a user's turn, or hardly a prompt is left.
    """
    ours = cast("TextTokenizer", tokenizer)
    template = template_for(ours)
    opening, closing = turn_of_user(ours)
    made = generate_together(
        model,
        [opening] * num_sampled,
        GenerationSettings(
            do_sample=True,
            temperature=1.0,
            top_p=0.95,
            top_k=0,
            max_new_tokens=MAX_TOKENS,
            batch_size=BATCH_SIZE,
            seed=seed,
        ),
        # A release with role tokens closes the turn by one of them, the others by text: `closing`.
        stop_ids=(*template.stop_ids(ours), *(closing[:1] if not _text(tokenizer, closing) else ())),
        pad_id=cast("int", tokenizer.pad_token_id),
        share=share,
        progress=progress,
    )
    end = _text(tokenizer, closing)
    found: dict[str, None] = {}
    for answer in made:
        text = str(tokenizer.decode(list(answer.token_ids), skip_special_tokens=True))
        question, closed, _ = text.partition(end) if end else (text, answer.stop_reason == "eos", "")
        if question.strip() and (closed or answer.stop_reason == "eos"):
            found[question.strip()] = None
    if len(found) < FEWEST:
        raise ConfigError(
            f"`retain.prompts` is `self`, but of {num_sampled} prompts that the base thought up {len(found)} "
            f"can be used, fewer than {FEWEST}: it may be no chat model. Use `retain.prompts=shipped`, or "
            "give a file."
        )
    return [Prompt((Message("user", question),), "self") for question in found]


def turn_of_user(tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens in front of a user's question and those behind it, found by asking several.

    Args:
        tokenizer: of the release.

    Raises:
        ConfigError: the release has none in front, or none behind.
    """
    template = template_for(tokenizer)
    asked = [template.encode_prompt(tokenizer, [Message("user", text)]) for text in _SAMPLES]
    before, behind = _common(asked), _common([ids[::-1] for ids in asked])[::-1]
    if template.bidirectional_context or len(before) <= len(tokenizer.prefix_ids) or not behind:
        raise ConfigError(
            f"`retain.prompts` is `self`, but {template.name} puts no mark around a question, so the model "
            "cannot be asked to think one up. Use `retain.prompts=shipped`, or give a file."
        )
    return before, behind


def _common(rows: list[list[int]]) -> list[int]:
    found: list[int] = []
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        found.append(tokens[0])
    return found


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
