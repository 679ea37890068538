"""Replay: general rows beside the task's in every optimizer step, their loss a mean of its own.

    L = (1 / N_T) sum over task tokens of -log p(y)  +  weight x (1 / N_G) sum over general tokens of l

l is -log p(a), a the base's own greedy answer (``answers``), or KL(base || tuned) along it (``kl``). Mixed
into the task's rows, three general rows of sixteen carry 6 % of the labels and count as much; with a mean of
their own they count ``weight``, however short their answers are.

The general rows of a step are spread over its micro-batches and processes, in forward passes of their own::

    accumulation 4, two processes,       micro-batch    0      1      2      3
    one task row in each, 2 general      process 0    T + G    T      T      T
    rows in a step                       process 1    T + G    T      T      T

so task rows are batched and packed as ever, and a pass holds as few general rows as possible. All processes
make the same passes (one without a row runs a filler: the row of another, without labels), as DDP, ZeRO and
FSDP wait for each other in every one. Both parts are summed before the one backward pass.

Which rows a step takes follows from the seed and the number of the step alone, so a run that goes on takes
those of one never stopped; and as every process knows all answers, N_G needs no communication.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from glmtune.data.collate import DynamicPaddingCollator
from glmtune.labels import IGNORE_INDEX
from glmtune.retention.base_answers import BaseAnswers
from glmtune.retention.settings import RetainSettings, rows_per_pass

MeanLoss = Callable[..., Tensor]


class Replay:
    """Gives every micro-batch its general rows, and adds up what they lose.

    Attributes:
        settings: weight and kind of the loss, and where the prompts come from.
        tokenizer: of the model.
        rows: general rows in an optimizer step.
        answers: of the base; None until training begins.
        task_loss: the task's part of the last micro-batch's loss.
        num_tokens: tokens of this process's general rows in the last micro-batch.
        rows_of_step: numbers of the general rows of the current step, of all processes.
    """

    def __init__(
        self,
        settings: RetainSettings,
        *,
        rows_per_step: int,
        accumulation: int,
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Plan; `answers` are to follow.

        Args:
            settings: of the replay.
            rows_per_step: task rows of an optimizer step.
            accumulation: micro-batches of a step.
            seed: of the run; decides the order of the general rows.
            tokenizer: of the model.
            rank: of this process.
            num_processes: that share the rows.
        """
        self.settings = settings
        self.tokenizer = tokenizer
        self.rows = settings.rows_of(rows_per_step)
        self.answers: BaseAnswers | None = None
        self.task_loss = torch.zeros(())
        self.num_tokens = 0
        self.rows_of_step: list[int] = []
        self._accumulation, self._seed = accumulation, seed
        self._rank, self._num_processes = rank, num_processes
        self._collate = DynamicPaddingCollator(cast(int, tokenizer.pad_token_id))
        self._batches: list[list[int]] = []
        self._num_labels = 1
        self._loss_sum: Tensor | None = None
        self._num_steps = 0

    # ---- which rows

    def begin_step(self, step: int, num_batches: int) -> None:
        """Choose the general rows of an optimizer step.

        Args:
            step: its number, from 0.
            num_batches: micro-batches that it has; the last step of an epoch may have fewer than others, and
                takes fewer general rows then.
        """
        assert self.answers is not None, "they are made before the first step"
        self._batches = self._rows_of(step)[:num_batches]
        self.rows_of_step = [row for rows in self._batches for row in rows]
        self._num_labels = sum(len(self.answers.answer_ids[row]) for row in self.rows_of_step)
        self._num_steps += 1

    def _rows_of(self, step: int) -> list[list[int]]:
        """Return the general rows of every micro-batch of a step, those of all processes together."""
        first = step * self.rows
        numbers = [self._row_at(place) for place in range(first, first + self.rows)]
        each = self._num_processes * rows_per_pass(
            self.rows, accumulation=self._accumulation, num_processes=self._num_processes
        )
        parts = [numbers[start : start + each] for start in range(0, len(numbers), each)]
        batches: list[list[int]] = [[] for _ in range(self._accumulation)]
        for number, part in enumerate(parts):
            batches[number * self._accumulation // len(parts)] = part
        return batches

    def _row_at(self, place: int) -> int:
        """Return the row at a place of the endless order: all rows, shuffled anew each time around."""
        assert self.answers is not None
        around, index = divmod(place, len(self.answers))
        return int(np.random.default_rng([self._seed, around]).permutation(len(self.answers))[index])

    def next_batch(self) -> dict[str, Tensor] | None:
        """Return this process's general rows of the next micro-batch.

        Returns:
            ``input_ids``, ``labels`` and ``attention_mask``, int64 ``[B, S]``; None where no process has any.
        """
        rows = self._batches.pop(0)
        own = rows[self._rank :: self._num_processes]
        self.num_tokens = 0
        if not rows:
            return None
        encoded = [self._encoded(row) for row in own]
        self.num_tokens = sum(len(row["input_ids"]) for row in encoded)
        if not own:
            filler = self._encoded(rows[0])
            encoded = [{**filler, "labels": [IGNORE_INDEX] * len(filler["labels"])}]
        return self._collate(encoded)

    def _encoded(self, row: int) -> dict[str, list[int]]:
        assert self.answers is not None
        prompt, answer = self.answers.prompt_ids[row], self.answers.answer_ids[row]
        return {"input_ids": [*prompt, *answer], "labels": [*[IGNORE_INDEX] * len(prompt), *answer]}

    # ---- their loss

    def loss(
        self,
        model: nn.Module,
        mean_loss: MeanLoss,
        prepare: Callable[[Any], dict[str, Any]],
        bypassed: Callable[[], AbstractContextManager[dict[str, Any]]],
        task: Callable[[], Tensor],
    ) -> Tensor:
        """Compute the loss of the next micro-batch: the task's, and that of the general rows beside it.

        Args:
            model: as training wraps it.
            mean_loss: of a batch, given the number of labels of the whole step (``num_items_in_batch``), and
                scaled as the trainer scales the task's: both parts must meet the same factors.
            prepare: moves a batch to the device.
            bypassed: see `glmtune.training.adapt.Tuned.bypassed`.
            task: computes the task's part.

        Returns:
            The sum to go back from; float32 ``[]``.
        """
        batch = self.next_batch()
        general = None if batch is None else prepare(batch)
        if general is not None and self.settings.loss == "kl":
            # First of the three passes, as DDP notes at every pass with gradients what it will wait for.
            general["base_hidden"] = self._base_hidden(model, general, bypassed)
        loss = task()
        self.task_loss = loss.detach()
        before = torch.zeros(()) if self._loss_sum is None else self._loss_sum
        self._loss_sum = before.to(self.task_loss)
        if general is None:
            return loss
        items = torch.tensor(self._num_labels, device=loss.device)
        lost = mean_loss(general, num_items_in_batch=items)
        self._loss_sum += lost.detach()
        return loss + self.settings.weight * lost

    @torch.no_grad()
    def _base_hidden(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        bypassed: Callable[[], AbstractContextManager[dict[str, Any]]],
    ) -> Tensor:
        """Return the base's hidden states at the labels, ``[T, D]``; its logits are formed chunk by chunk."""
        was_training = model.training
        model.eval()
        with bypassed() as keywords:
            output = model(**batch, **keywords, labelled_only=True, hidden_only=True)
        model.train(was_training)
        return output["hidden_TD"]

    # ---- what is logged

    def loss_state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the sum of general losses since the last line of the log, to be kept in a checkpoint.

        Args:
            reduce: takes the mean over all processes; a collective.
        """
        total = torch.zeros(()) if self._loss_sum is None else self._loss_sum
        return {"retain_sum": float(reduce(total.clone())), "retain_steps": self._num_steps}

    def begin(self, state: dict[str, float] | None = None) -> None:
        """Begin with nothing summed, or with what a checkpoint kept.

        Args:
            state: of `loss_state`; None: nothing.
        """
        state = state or {}
        self._num_steps = int(state.get("retain_steps", 0))
        kept = state.get("retain_sum")
        self._loss_sum = None if kept is None else torch.tensor(kept)

    def take_mean(self, reduce: Callable[[Tensor], Tensor]) -> float:
        """Return the mean general loss of the steps since it was last taken, in nats per token.

        Args:
            reduce: see `loss_state`.
        """
        mean = self.loss_state(reduce)["retain_sum"] / max(1, self._num_steps)
        self.begin()
        return mean
