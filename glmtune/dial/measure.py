"""One loaded model, several strengths: what each makes of the task's rows and of general prompts.

    strength 0        the base answers the general prompts, and its distributions along them are read, once
    every strength    the general prompts are read and answered (`glmtune.retention.measure`); the task's rows
                      are read (loss), and answered where ROUGE is asked for

The base is the same model with the strength at 0, which leaves out a prefix and adds nothing of a LoRA.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glmtune.adapter import set_scale
from glmtune.data.collate import DynamicPaddingCollator
from glmtune.data.dataset import EncodedSplit
from glmtune.dial.points import BASE_ANSWERS_FILE, DialPoint
from glmtune.inference.predict.generate import generate_completions
from glmtune.inference.predict.questions import Question
from glmtune.inference.settings import GenerationSettings
from glmtune.metrics.summary import summarize as summarize_texts
from glmtune.metrics.text import score_row
from glmtune.models.architectures.unwrap import unwrapped
from glmtune.prefix.attach import set_strength
from glmtune.retention.base_answers import BaseAnswers, make_answers, read_answers, write_answers
from glmtune.retention.distributions import base_distributions
from glmtune.retention.measure import Base, ask, summarize
from glmtune.retention.prompts import Prompt
from glmtune.retention.settings import RetentionSettings
from glmtune.retention.style import TaskStyle
from glmtune.training.evaluation import per_token, sum_over_tokens

ROUGE = "rouge-l"


class Dial:
    """A model whose tuned part can be turned to any strength, and what it is measured with.

    Attributes:
        base: what it answers without its tuned part.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: EncodedSplit,
        *,
        task_answers: Sequence[str],
        questions: Sequence[Question],
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        """Take a model with a prefix or a LoRA; `prepare` it before points are measured.

        Args:
            model: in evaluation mode, mutated.
            tokenizer: of the model.
            rows: of the task, encoded; their loss is measured.
            task_answers: answers of the task, which tell its style.
            questions: of the same rows, to answer and score; empty: none.
            batch_size: rows in one forward pass over whole answers.
            max_new_tokens: longest answer to a question.
        """
        self._model, self._tokenizer, self._rows = model, tokenizer, rows
        self._task_answers, self._questions = task_answers, questions
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self._is_prefix = getattr(unwrapped(model).base_model, "prefix_encoder", None) is not None

    def turn_to(self, strength: float) -> None:
        """Let the tuned part count so much from here on."""
        if self._is_prefix:
            set_strength(self._model, strength)
        else:
            set_scale(self._model, strength)

    def prepare(self, folder: Path, prompts: Sequence[Prompt], settings: RetentionSettings) -> None:
        """Ask the base, or read what it answered when the measuring began.

        Args:
            folder: keeps the answers.
            prompts: general ones.
            settings: of the answers.

        Raises:
            GlmtuneError: memory does not suffice, or the answers cannot be written or read.
        """
        self._settings = settings
        self.turn_to(0)
        file = folder / BASE_ANSWERS_FILE
        if file.is_file():
            answers = read_answers(file, self._tokenizer)
        else:
            answers = make_answers(
                self._model,
                self._tokenizer,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                progress="the base answers",
            )
            write_answers(file, answers)
        distributions = base_distributions(
            self._model, _rows_of(answers), pad_token_id=self._pad_token_id, batch_size=self._batch_size
        )
        self.base = Base(answers, distributions, TaskStyle(self._task_answers, answers.texts))

    def measure(self, strength: float, advance: Callable[[int], None] = lambda count: None) -> DialPoint:
        """Measure one strength; the model keeps it.

        Args:
            strength: at least 0.
            advance: told how many general answers are settled.

        Raises:
            GlmtuneError: memory does not suffice even for one row; the model's output is not finite.
        """
        start = time.monotonic()
        self.turn_to(strength)
        kept = summarize(
            ask(
                self._model,
                self._tokenizer,
                self.base,
                range(len(self.base.answers)),
                max_new_tokens=self._settings.max_new_tokens,
                batch_size=self._batch_size,
                advance=advance,
            )
        )
        # Over all tokens at once: a mean of batches would depend on how rows fall into them.
        loss = per_token(sum_over_tokens(self._model, self._batches(), self._device), prefix="eval")
        rouge_l = self._rouge_l() if self._questions else None
        return DialPoint(
            strength=strength,
            loss_nats=loss["eval_loss"],
            kept_frac=kept.kept_frac,
            kl_nats=kept.kl_nats,
            leak_frac=kept.leak_frac,
            rouge_l=rouge_l,
            seconds=round(time.monotonic() - start, 3),
        )

    def _batches(self) -> Iterator[Mapping[str, Tensor]]:
        collate = DynamicPaddingCollator(self._pad_token_id)
        # Long ones first: little padding, and what does not fit into memory fails at once.
        order = sorted(range(len(self._rows.lengths)), key=lambda row: (-int(self._rows.lengths[row]), row))
        for begin in range(0, len(order), self._batch_size):
            rows: list[Any] = [self._rows.rows[row] for row in order[begin : begin + self._batch_size]]
            yield {name: value.to(self._device) for name, value in collate(rows).items()}

    def _rouge_l(self) -> float:
        settings = GenerationSettings(max_new_tokens=self._max_new_tokens)
        prompts = [question.input_ids for question in self._questions]
        answers = generate_completions(self._model, self._tokenizer, prompts, settings)
        texts = {answer.index: answer.text for answer in answers}
        scored = [
            score_row(texts[place], question.reference or "")
            for place, question in enumerate(self._questions)
        ]
        return summarize_texts(scored)[ROUGE].value

    @property
    def _device(self) -> torch.device:
        return unwrapped(self._model).get_input_embeddings().weight.device

    @property
    def _pad_token_id(self) -> int:
        return cast(int, self._tokenizer.pad_token_id)


def _rows_of(answers: BaseAnswers) -> list[tuple[list[int], list[int]]]:
    return list(zip(answers.prompt_ids, answers.answer_ids, strict=True))
