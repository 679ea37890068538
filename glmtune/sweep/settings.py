"""Settings of a sweep: how its points are chosen, how often each is trained, and what tells the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glmtune.errors import ConfigError
from glmtune.settings import check_choice, check_range, setting

SEARCHES = ("grid", "optuna")


@dataclass(frozen=True)
class SweepSettings:
    """What is swept, beside the settings that are given several values themselves."""

    over: dict[str, Any] | None = setting(
        None,
        "settings and their values, {trainer.learning_rate: [1e-3,2e-2]}: for files; on the command line"
        " trainer.learning_rate=1e-3,2e-2 says the same",
    )
    metric: str = setting(
        "eval_loss",
        "what tells the best: eval_loss, eval_accuracy, eval_retention, ..., a score of predict (rouge-l,"
        " bleu-4, ...) or a benchmark (exam, ceval, ...)",
    )
    repeats: int = setting(
        1, "seeds that every point is trained with; from 3 on the best can be told from luck"
    )
    search: str = setting("grid", "which points: grid (all), or optuna (TPE: chosen by what came out before)")
    trials: int = setting(20, "search=optuna: points in all; more than before go on with the search")
    score_words: list[str] = setting(
        list, "further words of the predict or eval that scores a trial, such as [benchmark.limit=50]"
    )
    retry_failed: bool = setting(False, "train trials again that failed; they are kept as failed otherwise")
    max_failed: int = setting(3, "the sweep ends when so many trials have failed and none has succeeded")
    dry_run: bool = setting(False, "check every point, print the commands, and train nothing")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is not allowed.
        """
        check_choice("sweep.search", self.search, SEARCHES)
        for name in ("repeats", "trials", "max_failed"):
            check_range(f"sweep.{name}", getattr(self, name), low=1)
        for word in self.score_words:
            if "=" not in word:
                raise ConfigError(
                    f"`sweep.score_words` holds `{word}`, but each must be a setting with its value:"
                    " `sweep.score_words=[benchmark.limit=50]`."
                )
            if word.startswith("output_dir="):
                raise ConfigError(
                    f"`sweep.score_words` holds `{word}`, but scores of every trial have a folder of their"
                    " own. Leave it out."
                )
