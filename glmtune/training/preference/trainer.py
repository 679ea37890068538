"""The trainer of preference runs: its loss compares answers, measured against a reference.

Passes of one micro-batch of B examples, in this order (DDP notes at every pass with gradients what it will
wait for, so that one comes last)::

    reference   2B rows   no gradient   the tuned part passed by (`base`); none where it is kept (`start`)
    mismatched   B rows   no gradient   of KTO only
    policy      2B rows   gradient      (KTO: B rows)

The reference is the same weights: a prefix passed by, adapters passed by. No second model is held.

Sums, not means of batches: a step's loss is the mean over all its examples, in whatever micro-batches and
processes they are.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from glmtune.data.rows import TrainingRows
from glmtune.preference.figures import NUM_COLUMNS, example_losses, preference_figures, row_rewards
from glmtune.preference.log_probs import MODEL_INPUTS, AnswerLogProbs, answer_log_probs, answer_tokens
from glmtune.preference.rows import PreferenceRows
from glmtune.preference.settings import BASE, START, PreferenceSettings
from glmtune.training.evaluation import undisturbed
from glmtune.training.row_order import LengthOrder
from glmtune.training.trainer import GlmTrainer

SUMS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "right", "kl")
"""What is summed between two lines of the log, and with it how many better, worse and compared answers, and
batches, there were."""
COUNTS = ("chosen", "rejected", "compared", "batches")
KEPT = "preference"
"""Key of these sums in a checkpoint."""


@dataclass(frozen=True)
class _Compared:
    """A micro-batch under the model and its reference; rows are in the order of the batch."""

    policy: AnswerLogProbs
    reference: AnswerLogProbs | None
    mismatched: AnswerLogProbs | None
    desirable_B: Tensor
    is_real_B: Tensor

    def ratios(self) -> Tensor:
        """Return the log-ratios of the rows with gradient; without a reference the log-probabilities."""
        sums_R = self.policy.sums_R
        return sums_R if self.reference is None else sums_R - self.reference.sums_R[: len(sums_R)]


class PreferenceTrainer(GlmTrainer):
    """Trains what is tuned to prefer the better answers."""

    def __init__(
        self, *args: Any, preference: PreferenceSettings, reference: str | None, **kwargs: Any
    ) -> None:
        """Wire as `GlmTrainer` does.

        Args:
            *args: see `GlmTrainer`.
            preference: which loss.
            reference: ``base``, ``start``, or None for none.
            **kwargs: see `GlmTrainer`; ``rows`` are those of `glmtune.preference.rows.preference_set`.
        """
        self.preference = preference
        self.reference = reference
        self._is_base_alone = False
        self._sums: Tensor | None = None
        self._num_better_tokens: Tensor | None = None
        super().__init__(*args, **kwargs)

    # ---- examples

    def sets(self) -> dict[str, PreferenceRows]:
        """Return the examples of the run, by split."""
        rows: TrainingRows = self.rows
        named = {"train": rows.train, "validation": rows.validation}
        return {name: cast(PreferenceRows, each.rows) for name, each in named.items() if each is not None}

    # Called once per optimizer step, for all its micro-batches: what their losses are divided by. The parent
    # counts labels; here an example counts once, and the usual loss beside it by the better answers' tokens.
    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        counts = torch.zeros(2, dtype=torch.long)
        for batch in batch_samples:
            tokens_B = answer_tokens(batch["labels"]).chunk(2)[0]
            counts += torch.stack([(tokens_B > 0).sum(), tokens_B[batch["desirable"]].sum()]).cpu()
        total = cast(Tensor, self.accelerator.gather(counts.to(device)[None])).sum(dim=0)
        self._num_better_tokens = total[1]
        return total[0]

    # ---- loss

    def task_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the preference loss of a micro-batch: its sum by the examples of the whole step."""
        compared = self._compare(model, inputs)
        num_examples = kwargs.get("num_items_in_batch")
        assert num_examples is not None, "models of ours take the number of items"
        ratios_R, means_R = compared.ratios(), compared.policy.means_R()
        kl = self._kl(compared)
        losses_B = example_losses(
            self.preference,
            self._sides(ratios_R),
            self._sides(means_R),
            self._sides(compared.policy.tokens_R),
            desirable_B=compared.desirable_B,
            kl=kl,
        )
        loss = (losses_B * compared.is_real_B).sum() / num_examples.clamp(min=1)
        if self.preference.nll_weight:
            better_B = compared.is_real_B & compared.desirable_B
            nll = -compared.policy.sums_R[: len(better_B)][better_B].sum()
            assert self._num_better_tokens is not None
            loss = loss + self.preference.nll_weight * nll / self._num_better_tokens.clamp(min=1)
        self._note(compared, ratios_R.detach(), means_R.detach(), kl)
        # Gradients are averaged over processes, so that each counts as many times: as the parent scales.
        return loss * self.accelerator.num_processes

    def _sides(self, values_R: Tensor) -> tuple[Tensor, Tensor]:
        """Part what was computed of a batch's rows into the two answers; of judged ones there is one."""
        return _halves(values_R) if self.preference.takes_pairs else (values_R, values_R)

    def _compare(self, model: nn.Module, inputs: Mapping[str, Any]) -> _Compared:
        """Run all passes of a micro-batch."""
        num_examples = len(inputs["examples"])
        first = slice(num_examples)
        reference = self._reference(model, inputs)
        mismatched, batch = None, inputs
        if not self.preference.takes_pairs:
            with self._frozen(model):
                second = slice(num_examples, None)
                mismatched = answer_log_probs(model, _rows(inputs, second))
            batch = _rows(inputs, first)
        return _Compared(
            policy=answer_log_probs(model, batch),
            reference=reference,
            mismatched=mismatched,
            desirable_B=inputs["desirable"],
            is_real_B=answer_tokens(inputs["labels"])[first] > 0,
        )

    def _reference(self, model: nn.Module, inputs: Mapping[str, Any]) -> AnswerLogProbs | None:
        """Return the log-probabilities of a batch under the reference, kept or made now."""
        if self.reference is None:
            return None
        if "reference" in inputs:
            kept: Tensor = inputs["reference"]
            return AnswerLogProbs(kept.view(torch.float32).reshape(-1), answer_tokens(inputs["labels"]))
        assert self.reference == BASE, "what a run began with is kept before its first step"
        with self._frozen(model), self.tuned.bypassed() as keywords:
            return answer_log_probs(model, inputs, **keywords)

    @contextmanager
    def _frozen(self, model: nn.Module) -> Generator[None]:
        """Run a block without gradients and dropout, in the middle of a step."""
        was_training = model.training
        model.eval()
        with torch.no_grad():
            yield
        model.train(was_training)

    def _kl(self, compared: _Compared) -> Tensor | None:
        """Return KTO's z_0, over the batches of all processes."""
        if compared.mismatched is None:
            return None
        assert compared.reference is not None
        num_examples = len(compared.is_real_B)
        drift_B = compared.mismatched.sums_R - compared.reference.sums_R[num_examples:]
        real_B = compared.is_real_B
        sums = self._mean_of_processes(torch.stack([(drift_B * real_B).sum(), real_B.sum().to(drift_B)]))
        return (sums[0] / sums[1].clamp(min=1 / self.args.world_size)).clamp(min=0)

    # ---- what is logged

    def _note(self, compared: _Compared, ratios_R: Tensor, means_R: Tensor, kl: Tensor | None) -> None:
        """Add a batch to the sums between two lines of the log."""
        rewards, log_probs = row_rewards(self.preference, ratios_R, means_R), compared.policy.sums_R.detach()
        real_B, good_B = compared.is_real_B, compared.desirable_B
        if self.preference.takes_pairs:
            (better, worse), (log_better, log_worse) = (
                [half[real_B] for half in self._sides(values)] for values in (rewards, log_probs)
            )
            right = (torch.sign(better - worse) + 1) / 2
        else:
            sides = real_B & good_B, real_B & ~good_B
            (better, worse), (log_better, log_worse) = (
                [values[side] for side in sides] for values in (rewards, log_probs)
            )
            right = (torch.cat([torch.sign(better), -torch.sign(worse)]) + 1) / 2
        now = [better.sum(), worse.sum(), log_better.sum(), log_worse.sum(), right.sum()]
        values = [*now, torch.zeros_like(now[0]) if kl is None else kl]
        counts = torch.tensor([len(better), len(worse), len(right), 1]).to(values[0])
        added = torch.cat([torch.stack(values), counts]).double().cpu()
        self._sums = added if self._sums is None else self._sums + added

    def _reduced(self) -> Tensor:
        sums = torch.zeros(len(SUMS) + len(COUNTS), dtype=torch.double) if self._sums is None else self._sums
        # Double, so that a run that goes on adds to the very number; MPS has none.
        return self._mean_of_processes(sums.float() if self.args.device.type == "mps" else sums).cpu()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put rewards, margins and log-probabilities since the last line beside the loss."""
        if "loss" in logs:
            *sums, chosen, rejected, compared, batches = self._reduced().tolist()
            divisors = (chosen, rejected, chosen, rejected, compared, batches)
            means = [value / max(count, 1e-9) for value, count in zip(sums, divisors, strict=True)]
            found = dict(zip(SUMS, means, strict=True))
            right, kl = found.pop("right"), found.pop("kl")
            logs |= found | {
                "rewards/margins": found["rewards/chosen"] - found["rewards/rejected"],
                "rewards/accuracies": right,
            }
            if not self.preference.takes_pairs:
                logs["kl"] = kl
            self._sums = None
        super().log(logs, start_time)

    def loss_state(self) -> dict[str, Any]:
        """Keep the sums since the last line of the log, too."""
        return super().loss_state() | {KEPT: self._reduced().tolist()}

    def _begin(self) -> None:
        kept = (self._resumed_loss or {}).get(KEPT)
        self._sums = None if kept is None else torch.tensor(kept, dtype=torch.double)
        super()._begin()

    # ---- evaluation

    @contextmanager
    def base_alone(self) -> Generator[None]:
        """Evaluate what tuning is measured against: the base, or the model as the run begins."""
        if self.reference == START:
            yield
            return
        self._is_base_alone = True
        try:
            with super().base_alone():
                yield
        finally:
            self._is_base_alone = False

    def measure_rows(self, prefix: str) -> dict[str, float]:
        """Return loss, rewards and margins of the validation examples, with intervals; a collective."""
        rows = self.sets()["validation"]
        figures = preference_figures(self.measured("validation"), rows, self.preference)
        return {f"{prefix}_{name}": value for name, value in figures.items()}

    def measured(self, split: str, *, compares: bool = True) -> Tensor:
        """Run all examples of a split; a collective.

        Args:
            split: ``train`` or ``validation``.
            compares: run the reference, too; False: its columns are 0.

        Returns:
            float64 ``[N, 6]``, see `glmtune.preference.figures`; on the CPU, the same in every process.
        """
        rows, device = self.sets()[split], self.args.device
        found = torch.zeros((len(rows), NUM_COLUMNS), dtype=torch.double)
        model = cast(nn.Module, self.model_wrapped)
        with undisturbed(model, device):
            for inputs in self._batches(rows):
                compared = self._evaluated(model, inputs, compares=compares)
                real_B = compared.is_real_B.cpu()  # a filler is of an example that another process has
                found[inputs["examples"].cpu()[real_B]] = self._columns(compared)[real_B]
        found = self._sum_of_processes(found.float() if device.type == "mps" else found).double()
        if compares and self.reference == BASE and not self._is_base_alone and split != "train":
            rows.reference = found[:, 2:4].float().numpy()  # the base stays: asked once
        return found

    def _batches(self, rows: PreferenceRows) -> Iterator[dict[str, Any]]:
        batch_size = self.args.per_device_eval_batch_size
        for batch in self._rank_loader(rows, LengthOrder(rows.lengths), batch_size):
            yield self._prepare_inputs(batch)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _evaluated(self, model: nn.Module, inputs: Mapping[str, Any], *, compares: bool) -> _Compared:
        """Run both rows of every example under the model, and under the reference where there is one."""
        policy = answer_log_probs(model, inputs)
        reference = None
        if compares:
            is_own = self._is_base_alone and self.reference == BASE
            reference = policy if is_own else self._reference(model, inputs)
        desirable = inputs["desirable"]
        return _Compared(policy, reference, None, desirable, policy.tokens_R[: len(desirable)] > 0)

    def _columns(self, compared: _Compared) -> Tensor:
        policy, reference = compared.policy, compared.reference
        before = torch.zeros_like(policy.sums_R) if reference is None else reference.sums_R
        columns = [half for values in (policy.sums_R, before, policy.tokens_R) for half in _halves(values)]
        return torch.stack([column.float().cpu().double() for column in columns], dim=1)

    def _sum_of_processes(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(values.to(self.args.device), "sum")).cpu()


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Part the rows of a batch into first and second ones."""
    first, second = values.chunk(2)
    return first, second


def _rows(inputs: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return {name: inputs[name][rows] for name in MODEL_INPUTS}
