"""The base's own answers to general prompts: made once, before the first step, and never again.

Retention is measured against them and replay learns them, so they are kept in the run folder, and their
fingerprint is a fact of the run: a run that goes on reads them and must find what it began with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glmtune.data.records import RowProblem
from glmtune.errors import CheckpointError, ConfigError, DataError
from glmtune.inference.engine.many_prompts import GeneratedIds
from glmtune.inference.predict.generate import generate_ids
from glmtune.inference.settings import GenerationSettings
from glmtune.messages import Message
from glmtune.models.templates.renderer import TextTokenizer, template_for
from glmtune.models.templates.tool_calls import write_tools
from glmtune.retention.prompts import Prompt
from glmtune.storage.checksums import checked_line, with_checksum
from glmtune.storage.files import write_text_atomically
from glmtune.terminal.progress import Meter
from glmtune.training.distributed import collectives

BATCH_SIZE = 64


@dataclass(frozen=True)
class BaseAnswers:
    """Prompts and what the base answers to them; all lists have one place per prompt.

    Attributes:
        prompt_ids: by the release's template, without the task's prefix or system message.
        answer_ids: the greedy answer, the token that ended it included where one did.
        prompts: the same in messages; those that leave the context no room for an answer are left out.
        texts: the answers as they are shown.
    """

    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]
    prompts: list[Prompt]
    texts: list[str]

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of all of it."""
        digest = sha256()
        for row in _rows(self):
            digest.update(json.dumps(row, sort_keys=True).encode())
            digest.update(b"\n")
        return digest.hexdigest()

    def __len__(self) -> int:
        """Return how many prompts were answered."""
        return len(self.prompts)


def make_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    share: bool = True,
    progress: str = "",
) -> BaseAnswers:
    """Let a model answer prompts greedily. A collective: all processes call it and get the same answers.

    Random numbers are neither drawn nor changed, and the model is in the mode it was in afterwards.

    Args:
        model: the base, what is tuned turned off.
        tokenizer: its tokenizer; it decides the template.
        prompts: to answer.
        max_new_tokens: longest answer, the token that ends it included.
        batch_size: rows generated at once.
        share: every process answers a part of them; False where weights are sharded, so that all must
            compute the same at the same time.
        progress: what the display on the error stream is called; "": none.

    Raises:
        ConfigError: no prompt fits the model's context with its answer.
        GlmtuneError: memory does not suffice even for one row; the model's output is not finite.
    """
    kept, prompt_ids = _encoded(tokenizer, prompts, model.config.max_position_embeddings - max_new_tokens)
    if not kept:
        raise ConfigError(
            f"None of the {len(prompts)} general prompts fits the model's context of "
            f"{model.config.max_position_embeddings} tokens with an answer of {max_new_tokens}. Lower "
            "`max_new_tokens`, or give shorter prompts."
        )
    ours = cast("TextTokenizer", tokenizer)
    made = generate_together(
        model,
        prompt_ids,
        GenerationSettings(max_new_tokens=max_new_tokens, batch_size=batch_size),
        stop_ids=template_for(ours).stop_ids(ours),
        pad_id=cast("int", tokenizer.pad_token_id),
        share=share,
        progress=progress,
    )
    ends = [[] if answer.stop_id is None else [answer.stop_id] for answer in made]
    answers = [[*answer.token_ids, *end] for answer, end in zip(made, ends, strict=True)]
    return BaseAnswers(prompt_ids, answers, kept, [_text(tokenizer, ids) for ids in answers])


def generate_together(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    share: bool,
    progress: str,
) -> list[GeneratedIds]:
    """Generate in all processes, and return in each what all have made, in the order of the prompts.

    Args:
        model: see `generate_ids`; so are settings, ``stop_ids`` and ``pad_id``.
        prompts: token ids, none empty.
        settings: how to generate.
        stop_ids: tokens that end an answer.
        pad_id: what pads.
        share: see `make_answers`; so is ``progress``.
        progress: title of the display.
    """
    shared = share and collectives.is_distributed()
    rank, count = collectives.place() if shared else (0, 1)
    mine = range(rank, len(prompts), count)
    found: dict[int, GeneratedIds] = {}
    shows = bool(progress) and collectives.is_main_process()
    meter = Meter(progress, total=len(mine), transient=True) if shows else None
    own = [prompts[place] for place in mine]
    # No error may end one process alone: the others would wait for it in the gathering.
    with collectives.propagate_errors() if shared else nullcontext(), meter or nullcontext():
        # A row's place among all is its number, which decides its random numbers where it is sampled.
        for made in generate_ids(model, own, settings, stop_ids=stop_ids, pad_id=pad_id, rows=mine):
            found[mine[made.index]] = made
            if meter is not None:
                meter.update(len(found), tokens=made.num_new_tokens)
    if shared:
        found = {place: made for part in collectives.all_gather(found) for place, made in part.items()}
    return [found[place] for place in range(len(prompts))]


def _encoded(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt], longest: int
) -> tuple[list[Prompt], list[list[int]]]:
    """Return the prompts of at most so many tokens, and their tokens."""
    ours = cast("TextTokenizer", tokenizer)
    template = template_for(ours)
    kept: list[Prompt] = []
    encoded: list[list[int]] = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            ids = template.encode_prompt(ours, write_tools(template, prompt.messages))
        except (DataError, RowProblem) as error:
            raise DataError(f"general prompt {number} does not fit the model's template: {error}") from None
        if len(ids) <= longest:
            kept.append(prompt)
            encoded.append(ids)
    return kept, encoded


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    return template_for(cast("TextTokenizer", tokenizer)).clean_answer(str(text))


def write_answers(file: Path, answers: BaseAnswers) -> None:
    """Write answers as JSON Lines that people can read, whole or not at all; the folder is made.

    Args:
        file: where to.
        answers: of the base.

    Raises:
        GlmtuneError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    head = {"rows": len(answers), "fingerprint": answers.fingerprint}
    lines = [with_checksum(row) for row in (head, *_rows(answers))]
    write_text_atomically(file, "".join(lines))


def read_answers(file: Path, tokenizer: PreTrainedTokenizerBase) -> BaseAnswers:
    """Read what `write_answers` wrote.

    Args:
        file: the file.
        tokenizer: that of the answers.

    Raises:
        CheckpointError: it is absent or damaged, or another tokenizer wrote it.
    """
    way_out = "Bring the file back, or begin anew with `resume=never`, which makes it again."
    try:
        # Not by `splitlines`: it also parts at U+2028 and others, which JSON leaves as they are in an answer.
        lines = file.read_bytes().split(b"\n")
        head, *rows = [checked_line(line.decode("utf-8")) for line in lines if line]
        answers = BaseAnswers(
            [row["prompt_ids"] for row in rows],
            [row["answer_ids"] for row in rows],
            [_read_prompt(row) for row in rows],
            [row["answer"] for row in rows],
        )
        whole = head["rows"] == len(rows) and head["fingerprint"] == answers.fingerprint
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is absent: the base's answers are made once, before the first step. {way_out}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. {way_out}") from None
    if not whole:
        raise CheckpointError(f"{file} is not whole: it holds {len(rows)} rows of {head['rows']}. {way_out}")
    if [_text(tokenizer, ids) for ids in answers.answer_ids] != answers.texts:
        raise CheckpointError(
            f"{file} holds answers of a model with another tokenizer: its tokens mean other text. {way_out}"
        )
    return answers


def _rows(answers: BaseAnswers) -> Iterable[dict[str, Any]]:
    parts = (answers.prompts, answers.texts, answers.prompt_ids, answers.answer_ids)
    for prompt, text, prompt_ids, answer_ids in zip(*parts, strict=True):
        yield {
            "messages": [_said(message) for message in prompt.messages],
            "category": prompt.category,
            "language": prompt.language,
            "answer": text,
            "prompt_ids": prompt_ids,
            "answer_ids": answer_ids,
        }


def _said(message: Message) -> dict[str, Any]:
    """Return what a message says; role and content always, the rest where it is not the default."""
    default = Message(message.role, message.content)
    values = asdict(message)
    return {
        name: value
        for name, value in values.items()
        if name in ("role", "content") or value != getattr(default, name)
    }


def _read_prompt(row: dict[str, Any]) -> Prompt:
    messages = tuple(Message(**values) for values in row["messages"])
    return Prompt(messages, row["category"], row["language"])
