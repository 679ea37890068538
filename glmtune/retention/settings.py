"""Settings of what a run measures of the base's answers, and of the replay that keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.settings import check_choice, check_range, setting

LOSSES = ("answers", "kl")
SHIPPED = "shipped"
TASK_ROWS_PER_GENERAL = 4
"""Unless `retain.rows` says otherwise."""
SELF = "self"
RETAIN_FILE = "retention/retain.jsonl"
"""In a run folder: what is replayed."""


@dataclass(frozen=True, kw_only=True)
class RetentionSettings:
    """What is measured of a tuned model at every evaluation: how much it answers as its base does."""

    prompts: str = setting(
        SHIPPED, "what is asked: shipped (200 prompts in Chinese and English), or a file of rows"
    )
    num_prompts: int = setting(200, "prompts asked, of those there are")
    max_new_tokens: int = setting(64, "tokens compared of an answer")
    target: float | None = setting(
        None, "`best` is chosen among evaluations that keep at least this share of answers; null: among all"
    )
    exam: str | None = setting(
        None,
        "questions with keys, asked before and after: exam (shipped), a benchmark (mmlu), or null: none",
    )
    exam_limit: int | None = setting(None, "questions of every subject of the exam; null: all")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is out of its range, or nothing would read it.
        """
        check_range("retention.num_prompts", self.num_prompts, low=1)
        check_range("retention.max_new_tokens", self.max_new_tokens, low=1)
        if self.target is not None:
            check_range("retention.target", self.target, low=0, high=1)
        if self.exam_limit is not None:
            check_range("retention.exam_limit", self.exam_limit, low=1)
            if self.exam is None:
                raise ConfigError(
                    f"`retention.exam_limit` is {self.exam_limit}, but `retention.exam` is null: nothing is "
                    "asked. Name an exam, such as `retention.exam=exam`."
                )


@dataclass(frozen=True, kw_only=True)
class RetainSettings:
    """Replay of general prompts: L = task mean + weight x general mean, each mean over its own tokens."""

    prompts: str = setting(
        SHIPPED,
        "general prompts: shipped (600 and more in Chinese and English), self (thought up by the base), or a "
        "file of rows",
    )
    weight: float = setting(1.0, "what the mean over general tokens counts beside that over the task's")
    rows: int | None = setting(None, "general rows in one optimizer step; null: a quarter of the task's rows")
    loss: str = setting(
        "answers", "answers: learn the base's own answers; kl: stay near the base's probabilities along them"
    )
    max_new_tokens: int = setting(128, "longest answer of the base, in tokens")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is out of its range.
        """
        check_choice("retain.loss", self.loss, LOSSES)
        check_range("retain.max_new_tokens", self.max_new_tokens, low=1)
        if self.weight <= 0:
            raise ConfigError(
                f"`retain.weight` is {self.weight}, but must be above 0. To train without replay add "
                "`retain=null`."
            )
        if self.rows is not None:
            check_range("retain.rows", self.rows, low=1)

    def rows_of(self, rows_per_step: int) -> int:
        """Return how many general rows an optimizer step takes.

        Args:
            rows_per_step: task rows of all micro-batches and processes.
        """
        return self.rows or max(1, rows_per_step // TASK_ROWS_PER_GENERAL)


def rows_per_pass(rows: int, *, accumulation: int, num_processes: int) -> int:
    """Return how many general rows a process has in a forward pass at most: as few as possible.

    Args:
        rows: in an optimizer step.
        accumulation: micro-batches of a step.
        num_processes: that share them.

    >>> rows_per_pass(4, accumulation=16, num_processes=1), rows_per_pass(9, accumulation=2, num_processes=2)
    (1, 3)
    """
    return -(-rows // (accumulation * num_processes))
