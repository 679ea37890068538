"""An exam before and after tuning: of what a base answered rightly, how much is still right.

The model in memory is asked twice, as the base and as what became of it, and both times by the same protocol
as `glmtune eval` does; the folders are those of evaluations, which `glmtune compare runs=` reads as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.backends.glm import GlmBackend
from evaluation.benchmarks.tasks import task_of
from evaluation.compare.pairing.match import match
from evaluation.compare.pairing.runs import read_run
from evaluation.compare.statistics.counts import PairCounts, Strata, count_pairs
from evaluation.compare.statistics.intervals import score_bounds
from evaluation.evaluate import evaluate_model
from evaluation.running.data_parallel import Processes
from evaluation.running.run_files import RESULTS_NAME
from evaluation.settings import BenchmarkSettings
from glmtune.errors import ConfigError
from glmtune.terminal.console import Console

CONFIDENCE = 0.95
"""Of the two-sided interval."""
BASE = "base"


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of a base's right answers.

    Attributes:
        benchmark: what was asked.
        kept: share of the answers right before that are right after; None where none was right before.
        kept_low: lower end of its 95 % interval.
        kept_high: upper end.
        num_right: questions that the base answered rightly.
        num_gained: questions right only after tuning.
        num_questions: all questions.
    """

    benchmark: str
    kept: float | None
    kept_low: float | None
    kept_high: float | None
    num_right: int
    num_gained: int
    num_questions: int


class Exam:
    """Asks the model of a run the same questions before and after it is tuned."""

    def __init__(
        self,
        benchmark: BenchmarkSettings,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        wait_seconds: float = 1800.0,
    ) -> None:
        """Make sure that there are questions with keys; nothing is asked yet.

        Args:
            benchmark: the questions.
            folder: where the answers go, a folder for each time.
            model: in memory; asked as it is at the time.
            tokenizer: its tokenizer.
            name: of the base, as the user named it; it decides whether questions are conversations.
            wait_seconds: how long processes that share the questions wait for each other.

        Raises:
            ConfigError: there is no such benchmark; DataError: its files cannot be used.
        """
        self.benchmark, self.folder = benchmark, folder
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._wait_seconds = wait_seconds
        task = task_of(benchmark, benchmark.name, None, is_chat=True)
        if task.is_graded(next(iter(task.rules))):
            raise ConfigError(
                f"`retention.exam` is `{benchmark.name}`, whose answers have grades, but what is kept is"
                " counted in right answers. Name another one, such as `retention.exam=exam`."
            )
        if not task.labelled:
            raise ConfigError(
                f"`retention.exam` is `{benchmark.name}`, whose default split has no gold answers, so "
                "nothing tells what is kept. Name another one, such as `retention.exam=exam`."
            )

    @property
    def has_base(self) -> bool:
        """Whether the base has answered every question."""
        return (self.folder / BASE / RESULTS_NAME).is_file()

    def ask_base(self) -> None:
        """Ask the model, which is its own base now; what is answered already is not asked again."""
        self._ask(BASE)

    def ask_tuned(self, step: int) -> Kept | None:
        """Ask the tuned model, and compare.

        Args:
            step: at which it is; names the folder of its answers.

        Returns:
            What is kept; None in processes other than the first.
        """
        name = f"step-{step}"
        return compare_kept(self.folder / BASE, self.folder / name) if self._ask(name) else None

    def _ask(self, name: str) -> bool:
        """Ask every question; tell whether this process is the one that reports."""
        backend = GlmBackend(self._model, self._tokenizer, name=self._name)
        task = task_of(self.benchmark, self.benchmark.name, None, is_chat=backend.identity.is_chat)
        done = evaluate_model(
            task,
            backend,
            Console(stderr=True, quiet=True),  # its tables are for whoever evaluates, not for a run
            output_dir=self.folder / name,
            processes=Processes.from_environment(self._wait_seconds),
        )
        return done is not None


def compare_kept(before: Path, after: Path) -> Kept:
    """Compare two evaluations of one benchmark.

    The interval is `glmtune compare`'s score interval of a paired drop over the questions that the base had
    right; without gains, of which there can be none among these, it is Wilson's interval of a share.

    Args:
        before: folder of the base's answers.
        after: of the tuned model's.

    Raises:
        DataError: they differ in questions or protocol, or cannot be read.
    """
    pair = match(read_run(before), read_run(after))
    counts = sum(
        count_pairs([one.outcome for one, _ in pair.rows], [two.outcome for _, two in pair.rows]).values(),
        PairCounts(),
    )
    right = counts.both + counts.lost
    kept = low = high = None
    if right:
        # Of these questions nothing can be gained, so the drop is the share lost. The interval is of any
        # drop, and reaches below 0 where little was lost; a share does not.
        drop = score_bounds(
            Strata.micro([PairCounts(both=counts.both, lost=counts.lost)]), (1 + CONFIDENCE) / 2
        )
        kept, low, high = counts.both / right, 1 - drop.high, 1 - max(drop.low, 0.0)
    return Kept(pair.benchmark, kept, low, high, right, counts.gained, counts.num_samples)


def ways_to_ask(values: dict[str, Any], tuned: dict[str, Any], exam: BenchmarkSettings) -> tuple[str, str]:
    """Word the two commands that ask an exam after a run which could not.

    Args:
        values: settings by which a command takes the base, see `glmtune.command_line.model_words`.
        tuned: settings by which it takes what was tuned.
        exam: the questions.
    """
    from glmtune.command_line import command_words

    asked = {"benchmark": exam.name, "benchmark.limit": exam.limit}
    return command_words("eval", {**asked, **values}), command_words("eval", {**asked, **values, **tuned})
