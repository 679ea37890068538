"""Fitting a switch in a run: which prompts, their hidden states, and what is said of it.

It is fitted before the first step, not after the last: the rule looks at the base alone, which training
leaves as it is. So every checkpoint holds it, a killed run finds it in the one it goes on from, and whoever
has a task that cannot be told from other questions learns so before hours of training.

Under ZeRO and FSDP, which shard the base, all processes read all prompts together; otherwise the main process
reads them alone. It fits in either case, and tells the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from glmtune.data.collate import DynamicPaddingCollator
from glmtune.data.dataset import EncodedSplit
from glmtune.errors import ConfigError
from glmtune.labels import IGNORE_INDEX
from glmtune.models.architectures.unwrap import unwrapped
from glmtune.models.templates.renderer import TextTokenizer, template_for
from glmtune.retention.prompts import load_prompts
from glmtune.retention.settings import SELF, SHIPPED, RetainSettings
from glmtune.storage.manifest import read_manifest as parsed_manifest
from glmtune.switch.fit import MIN_PROMPTS, fit_logistic, fit_one_class
from glmtune.switch.rule import Switch, SwitchFacts
from glmtune.switch.settings import AUTO, NONE, SwitchSettings
from glmtune.training.adapt import Tuned, TunedAdapter, TunedPrefix
from glmtune.training.distributed import collectives
from glmtune.training.evaluation import per_token, sum_over_tokens

MAX_TASK_PROMPTS, MAX_GENERAL_PROMPTS = 400, 800
"""More tell nothing new, and each is read once by the base."""
READ_TOKENS = 2048
"""Prompt tokens of a batch, padding included: a base on a CPU reads them in a second or a few."""
MANIFEST_KEY = "switch"
"""Of a checkpoint's manifest: what `SwitchOutcome.values` says."""


@dataclass(frozen=True)
class SwitchOutcome:
    """How fitting a switch went.

    Attributes:
        facts: figures of the rule.
        min_auroc: what they had to reach.
        prompts: which general prompts it was told.
        is_saved: whether the files hold the rule.
    """

    facts: SwitchFacts
    min_auroc: float
    prompts: str
    is_saved: bool

    def values(self) -> dict[str, Any]:
        """Return it as plain values, for manifests and results."""
        return dataclasses.asdict(self.facts) | {
            "min_auroc": self.min_auroc, "prompts": self.prompts, "saved": self.is_saved,
        }  # fmt: skip

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> SwitchOutcome:
        """Return what `values` was made of."""
        names = [field.name for field in dataclasses.fields(SwitchFacts)]
        facts = SwitchFacts(**{name: values[name] for name in names})
        return cls(facts, values["min_auroc"], values["prompts"], values["saved"])

    def line(self) -> str:
        """Word it for whoever trains."""
        if self.is_saved:
            return f"switch: {self.facts.line()}"
        return (
            f"switch: {self.facts.line()}. No switch is saved: AUROC must be at least {self.min_auroc:g}, as "
            "task prompts and others are mixed up otherwise; what is tuned applies to every request. Make "
            "the task's prompts tell themselves apart (`data.source_prefix`, a system message), or accept "
            "it: lower `switch_min_auroc`."
        )


class Evaluating(Protocol):
    """What an evaluation needs of a trainer."""

    tuned: Tuned
    args: Any
    model_wrapped: Any

    @property
    def is_sharded(self) -> bool:
        """Whether all processes must compute together."""
        ...


@dataclass
class SwitchFitting:
    """A switch that a run is to have.

    Attributes:
        settings: ``switch_min_auroc`` and ``switch_prompts`` are read.
        tokenizer: of the base.
        train: rows of the task, not packed.
        validation: rows that are evaluated on, not packed; None where there are none.
        retain: names general prompts, where they are replayed.
        outcome: None until it was fitted.
        off_rows: numbers of the validation rows whose prompts are switched off.
    """

    settings: SwitchSettings
    tokenizer: TextTokenizer
    train: EncodedSplit
    validation: EncodedSplit | None
    retain: RetainSettings | None
    outcome: SwitchOutcome | None = None
    off_rows: tuple[int, ...] = ()
    _task: list[list[int]] = field(default_factory=list[list[int]])
    _general: list[list[int]] | None = None

    @property
    def prompts_from(self) -> str:
        """Which general prompts there are: ``shipped``, a file, or ``none``."""
        chosen = self.settings.switch_prompts
        if chosen != AUTO:
            return chosen
        # Prompts that the base thinks up are of its own making: they need not look like those of people.
        return SHIPPED if self.retain is None or self.retain.prompts == SELF else self.retain.prompts

    def prepare(self) -> None:
        """Collect the prompts, before anything is loaded or written for them.

        Raises:
            ConfigError: there are too few.
            DataError: a file of prompts cannot be read.
        """
        self._task, self._general = task_prompts(self.train), self._general_prompts()
        few = [
            f"{len(found)} {kind}"
            for kind, found in (("task", self._task), ("general", self._general))
            if found is not None and len(found) < MIN_PROMPTS
        ]
        if few:
            raise ConfigError(
                f"A switch is asked for, but there are {' and '.join(few)} prompts, and it takes at least "
                f"{MIN_PROMPTS} of each kind to learn one and to know how well it does. Give more rows, or "
                "leave `switch` out."
            )

    def begin(
        self, tuned: Tuned, run: nn.Module, stored: object, saved: Switch | None, *, is_sharded: bool
    ) -> None:
        """Fit the rule, or take the one that a checkpoint has, and give it to what is tuned; a collective.

        Args:
            tuned: mutated.
            run: the model as training wraps it; used where it is sharded.
            stored: what the manifest of the checkpoint says, if the run goes on from one.
            saved: the rule in that checkpoint.
            is_sharded: whether all processes must compute together.
        """
        assert isinstance(tuned, TunedPrefix | TunedAdapter)
        known = self._known(stored)
        reads = _Reading(tuned, run if is_sharded else cast(nn.Module, tuned.model), self.tokenizer)
        if known is None or known.is_saved != (saved is not None):
            saved, known = self._fitted(reads, is_sharded=is_sharded)
        self.outcome, tuned.switch = known, saved
        if saved is not None and self.validation is not None:
            self.off_rows = _off(saved, reads, _first_prompts(self.validation), is_sharded=is_sharded)

    def off_prompts(self, trainer: Evaluating, prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Return the numbers of the prompts that are left to the base; a collective.

        None is where no switch is saved: what is tuned then applies to every prompt.

        Args:
            trainer: between two steps, the switch fitted or read.
            prompts: token ids, at least one prompt.
        """
        tuned = trainer.tuned
        rule = tuned.switch if isinstance(tuned, TunedPrefix | TunedAdapter) else None
        if rule is None:
            return ()
        run = trainer.model_wrapped if trainer.is_sharded else tuned.model
        reads = _Reading(tuned, cast(nn.Module, run), self.tokenizer)
        return _off(rule, reads, prompts, is_sharded=trainer.is_sharded)

    def results(self, last: Path) -> dict[str, Any] | None:
        """Return what results say of it.

        Args:
            last: the newest checkpoint, where a killed run that had ended finds it.
        """
        if self.outcome is not None:
            return self.outcome.values()
        manifest = parsed_manifest(last) or {}
        return manifest.get(MANIFEST_KEY)

    def evaluate(self, trainer: Evaluating, sums: Tensor, prefix: str) -> dict[str, float]:
        """Return the loss that the switched model has: rows that are switched off have the base's.

        Those are few where the switch is any good, so only they are computed again: as they were counted, to
        take them out, and by the base.

        Args:
            trainer: between two steps.
            sums: of `sum_over_tokens`, over all rows and processes.
            prefix: what names of metrics start with.
        """
        if self.outcome is None or not self.outcome.is_saved:
            return {}
        if not self.off_rows:
            return {f"{prefix}_switched_loss": per_token(sums, prefix=prefix)[f"{prefix}_loss"]}
        model, device = trainer.model_wrapped, trainer.args.device
        tuned = sum_over_tokens(model, self._off_batches(trainer, {}), device)
        with trainer.tuned.bypassed() as keywords:
            base = sum_over_tokens(model, self._off_batches(trainer, keywords), device)
        # Only rows that are switched off are read again: their part is exchanged in the sums of all rows.
        switched = sums.cpu() - tuned.cpu() + base.cpu()
        return {f"{prefix}_switched_loss": per_token(switched, prefix=prefix)[f"{prefix}_loss"]}

    def _off_batches(self, trainer: Evaluating, keywords: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        assert self.validation is not None
        size = trainer.args.per_device_eval_batch_size
        collate = DynamicPaddingCollator(int(cast(Any, self.tokenizer).pad_token_id))
        for start in range(0, len(self.off_rows), size):
            batch = collate([self.validation.rows[row] for row in self.off_rows[start : start + size]])
            yield {name: part.to(trainer.args.device) for name, part in batch.items()} | dict(keywords)

    def _known(self, stored: object) -> SwitchOutcome | None:
        """Return the outcome that a checkpoint tells of, unless it was asked for otherwise then."""
        if not isinstance(stored, Mapping):
            return None
        outcome = SwitchOutcome.of_values(stored)
        asked = (self.settings.switch_min_auroc, self.prompts_from)
        return outcome if (outcome.min_auroc, outcome.prompts) == asked else None

    def _fitted(self, reads: _Reading, *, is_sharded: bool) -> tuple[Switch | None, SwitchOutcome]:
        task, general = self._task, self._general
        task_hidden = _in_turn(lambda: reads.hidden(task), is_sharded=is_sharded)
        general_hidden = None
        if general is not None:
            general_hidden = _in_turn(lambda: reads.hidden(general), is_sharded=is_sharded)

        def fit() -> Switch:
            if general_hidden is None:
                return fit_one_class(task_hidden())
            return fit_logistic(task_hidden(), general_hidden())

        switch = collectives.broadcast_from_main(fit)
        low = self.settings.switch_min_auroc
        is_saved = switch.facts.auroc is None or switch.facts.auroc >= low
        return switch if is_saved else None, SwitchOutcome(switch.facts, low, self.prompts_from, is_saved)

    def _general_prompts(self) -> list[list[int]] | None:
        if self.prompts_from == NONE:
            return None
        template = template_for(self.tokenizer)
        prompts = load_prompts(self.prompts_from, shipped="retain", limit=MAX_GENERAL_PROMPTS)
        return [list(template.encode_prompt(self.tokenizer, list(prompt.messages))) for prompt in prompts]


def task_prompts(split: EncodedSplit) -> list[list[int]]:
    """Return prompts of the task, as training encodes them, from rows at equal distances.

    A row of several answers gives the prompt of one of them, of each in turn: a switch decides at every
    question of a conversation.
    """
    count = min(MAX_TASK_PROMPTS, len(split.lengths))
    found: list[list[int]] = []
    for place in range(count):
        row = split.rows[place * len(split.lengths) // count]
        ends = list(_prompt_ends(row["labels"]))
        if ends:
            found.append(list(row["input_ids"][: ends[place % len(ends)]]))
    return found


def _first_prompts(split: EncodedSplit) -> list[list[int]]:
    """Return the prompt of the first answer of every row; of one without any the whole row."""
    rows = cast("Any", split.rows)
    return [list(row["input_ids"][: next(_prompt_ends(row["labels"]), len(row["labels"]))]) for row in rows]


def _prompt_ends(labels: Sequence[int]) -> Iterator[int]:
    """Yield where answers begin, behind at least one token."""
    for place in range(1, len(labels)):
        if labels[place] != IGNORE_INDEX and labels[place - 1] == IGNORE_INDEX:
            yield place


@dataclass(frozen=True)
class _Reading:
    """Reads prompts with the base alone, through the whole model, so that sharded weights are gathered."""

    tuned: Tuned
    run: nn.Module
    tokenizer: TextTokenizer

    @torch.no_grad()
    def hidden(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the last hidden states ``[N, D]`` of prompts, float32 on the CPU, in their order."""
        stack: Any = unwrapped(self.tuned.model).base_model
        taken: list[Tensor] = []
        hook = stack.register_forward_hook(lambda _, __, output: taken.append(output.last_hidden_state))
        was_training, device = self.run.training, self.tuned.model.device
        found: list[tuple[int, Tensor]] = []
        self.run.eval()
        try:
            with torch.random.fork_rng([]), self.tuned.bypassed() as keywords:
                for places in _batches(prompts):
                    batch, lengths = self._padded([prompts[place] for place in places], device)
                    self.run(**batch, use_cache=False, logits_to_keep=1, **keywords)
                    last_BD = taken.pop()[torch.arange(len(places)), lengths - 1]
                    found += zip(places, last_BD.float().cpu(), strict=True)
        finally:
            hook.remove()
            self.run.train(was_training)
        return torch.stack([hidden_D for _, hidden_D in sorted(found, key=lambda each: each[0])])

    def _padded(self, prompts: Sequence[Sequence[int]], device: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Pad on the right, as training does: a causal model never looks there, and ChatGLM-6B is masked."""
        width, pad = max(map(len, prompts)), int(cast(Any, self.tokenizer).pad_token_id)
        ids = torch.tensor([[*prompt, *[pad] * (width - len(prompt))] for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(width)[None] < lengths[:, None]).long()
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, lengths


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield places of prompts of like lengths, the longest first, `READ_TOKENS` at a time."""
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    while order:
        count = max(1, READ_TOKENS // len(prompts[order[0]]))
        yield order[:count]
        order = order[count:]


def _off(
    rule: Switch, reads: _Reading, prompts: Sequence[Sequence[int]], *, is_sharded: bool
) -> tuple[int, ...]:
    """Return which prompts a rule leaves to the base; all processes get what the main one finds."""
    hidden = _in_turn(lambda: reads.hidden(prompts), is_sharded=is_sharded)
    return collectives.broadcast_from_main(
        lambda: tuple(torch.nonzero(~rule.decide(hidden()))[:, 0].tolist())
    )


def _in_turn(read: Callable[[], Tensor], *, is_sharded: bool) -> Callable[[], Tensor]:
    """Compute now in all processes where they must do so together; else when the main one asks for it."""
    if not is_sharded:
        return read
    hidden = read()
    return lambda: hidden
