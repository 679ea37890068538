"""One trial after the other: trained in a process of its own, scored where the metric asks, recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from glmtune.command_line import without_secrets
from glmtune.errors import GlmtuneError
from glmtune.storage.journal import Journal
from glmtune.sweep.metrics import Metric, figures_of_run, score_of
from glmtune.sweep.processes import progress_of, run_command
from glmtune.sweep.scoring import Score
from glmtune.sweep.space import Point
from glmtune.sweep.statistics import PointResult
from glmtune.sweep.trials import DONE, FAILED, Trial, TrialRecord, changes_of, trial_name
from glmtune.terminal.progress import Meter

START_ANEW = 75
"""A run that went back to a checkpoint asks for it by this exit code, a few times at most."""
STOPPED = range(129, 129 + 64)
"""Exit codes, 128 and the signal that asked the run to stop, which it did in order. Larger ones, such as
those of Windows for a crash (0xC0000005), are failures."""


@dataclass
class Runner:
    """Trains what is missing.

    Attributes:
        journal: of the sweep, locked.
        records: by name of a trial, those of earlier commands included; grows.
        metric: what every trial must have a figure of.
        score: words the command that measures it.
        retry_failed: whether trials that failed before are trained again.
        max_failed: trials that may fail before any succeeds.
        problems: why a trial has no figure although it was trained; of this command alone.
    """

    journal: Journal
    records: dict[str, TrialRecord]
    metric: Metric
    score: Callable[[Trial], Score]
    retry_failed: bool = False
    max_failed: int = 3
    problems: dict[str, str] = field(default_factory=dict)

    def run(self, trials: Iterable[Trial], total: int) -> None:
        """Train and score what is not yet.

        Args:
            trials: all of the sweep; the next one is asked for when the one before has ended.
            total: how many there are.

        Raises:
            GlmtuneError: the first trials failed one and all, or a file cannot be written.
        """
        num_ended = num_known = 0
        with Meter("sweep", total=total, unit="trials") as meter:
            for trial in trials:
                if not self._is_open(trial):
                    num_known += 1
                    meter.update(num_ended, total=total - num_known)
                    continue
                self._do(trial, meter, num_ended)
                num_ended += 1
                meter.update(num_ended, state="")
                self._refuse_hopeless()

    def result(self, point: Point, seeds: Iterable[int]) -> PointResult:
        """Return what a point scored with every seed, or why it has no figure.

        Args:
            point: of the sweep.
            seeds: those that count.
        """
        by_seed: dict[int, float] = {}
        failed: dict[int, str] = {}
        for seed in seeds:
            name = trial_name(point, seed)
            value = self.value(name)
            if value is None:
                failed[seed] = self.problem(name)
            else:
                by_seed[seed] = value
        return PointResult(point, by_seed, failed)

    def value(self, name: str) -> float | None:
        """Return the figure of a trial; None where it has none, or none that is finite."""
        record = self.records.get(name)
        found = record.figures.get(self.metric.name) if record is not None and record.is_done else None
        return found if found is not None and math.isfinite(found) else None

    def problem(self, name: str) -> str:
        """Return why a trial has no figure."""
        record = self.records.get(name)
        return self.problems.get(name) or (record.reason if record is not None else "") or "not trained yet"

    def _is_open(self, trial: Trial) -> bool:
        return self._needs_training(trial) or (self._is_done(trial) and self.value(trial.name) is None)

    def _is_done(self, trial: Trial) -> bool:
        record = self.records.get(trial.name)
        return record is not None and record.is_done

    def _needs_training(self, trial: Trial) -> bool:
        record = self.records.get(trial.name)
        if record is None:
            return True
        # With other words it is not the trial that failed.
        return not record.is_done and (self.retry_failed or record.words != trial.words)

    def _do(self, trial: Trial, meter: Meter, num_ended: int) -> None:
        if self._needs_training(trial):
            words = ["train", *trial.words]
            if trial.name in self.records and trial.settings and changes_of(trial):
                # It failed with other settings, which a run that goes on repeats.
                words.append("resume=never")
            self._say_command(meter, words)
            self._keep(_trained(trial, words, lambda: self._show(meter, trial, num_ended)))
        if self._is_done(trial) and self.value(trial.name) is None:
            self._measure(trial, meter)
        value = self.value(trial.name)
        if value is None:
            meter.say(f"! {trial.name} failed: {self.problem(trial.name)}; see {trial.log}")
        else:
            seconds = self.records[trial.name].seconds
            meter.say(f"{trial.name}: {self.metric.name} {value:.4f} in {seconds:.0f} s")

    def _show(self, meter: Meter, trial: Trial, num_ended: int) -> None:
        trainer = trial.settings.get("trainer") or {}
        meter.update(num_ended + progress_of(trial.folder, trainer), state=trial.name)

    def _measure(self, trial: Trial, meter: Meter) -> None:
        """Add the figure that training has not measured; what goes wrong is tried again by later commands."""
        if self.metric.command == "train":
            figure = self.records[trial.name].figures.get(self.metric.name)
            told = f"no {self.metric.name}" if figure is None else f"{self.metric.name} {figure}"
            self.problems[trial.name] = f"its results tell {told}"
            return
        score = self.score(trial)
        self._say_command(meter, score.words)
        ended = run_command(score.words, trial.log)
        _refuse_stopped(trial, ended.code)
        if ended.code:
            self.problems[trial.name] = f"`glmtune {score.words[0]}`: {ended.reason}"
            return
        try:
            figure = score_of(self.metric, score.folder)
        except ValueError as error:
            self.problems[trial.name] = str(error)
            return
        record = self.records[trial.name]
        self._keep(replace(record, figures={**record.figures, self.metric.name: figure}))

    def _keep(self, record: TrialRecord) -> None:
        self.journal.append(record)
        self.records[record.name] = record

    def _refuse_hopeless(self) -> None:
        """End where nothing succeeds: what is wrong with all is seldom cured by the next."""
        failed = [record for record in self.records.values() if not record.is_done]
        if len(failed) == len(self.records) and len(failed) >= self.max_failed:
            raise GlmtuneError(
                f"{len(failed)} trials have failed and none has succeeded (`sweep.max_failed`). The last one:"
                f" {failed[-1].reason}\nMend it and run the command again: with other settings they are"
                " trained anew, with the same ones by `sweep.retry_failed=true`."
            )

    @staticmethod
    def _say_command(meter: Meter, words: Sequence[str]) -> None:
        meter.say(f"$ {without_secrets(['glmtune', *words])}")


def _trained(trial: Trial, words: Sequence[str], waiting: Callable[[], None]) -> TrialRecord:
    """Train a trial to its end, or go on with it.

    Raises:
        GlmtuneError: it was stopped by a signal.
    """
    from glmtune.training.report import RESULTS_FILE, read_results

    begin = time.monotonic()
    ended = run_command(words, trial.log, waiting)
    while ended.code == START_ANEW:
        ended = run_command(["train", *trial.words], trial.log, waiting)
    _refuse_stopped(trial, ended.code)
    seconds = round(time.monotonic() - begin, 1)
    reason = ended.reason if ended.code else ""
    figures: dict[str, float] = {}
    if not reason:
        try:
            results = read_results(trial.folder) or {}
            figures = figures_of_run(results)
            seconds = max(seconds, float(results.get("run_seconds") or 0))
        except (OSError, ValueError) as error:
            reason = f"{RESULTS_FILE}: {error}"
    state = FAILED if reason else DONE
    return TrialRecord(trial.name, trial.words, state, figures, seconds, ended.code, reason)


def _refuse_stopped(trial: Trial, code: int) -> None:
    if code in STOPPED:
        raise GlmtuneError(
            f"{trial.name} was stopped by signal {code - 128}. The same command goes on from there."
        )
