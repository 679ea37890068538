"""Score a file of predictions, or say whether two runs differ: `glmtune score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmtune.errors import ConfigError
from glmtune.settings import check_range, setting
from recipes.words.compose import Command

if TYPE_CHECKING:
    from glmtune.metrics.significance import Difference
    from glmtune.metrics.summary import TextReport

SCORE_NAME = "score.json"


@dataclass(frozen=True)
class ScoreConfig:
    """What to score: one file, or two runs against each other."""

    predictions: str | None = setting(
        None, "file to score: generated_predictions.jsonl, the official .txt, or a folder holding one"
    )
    a: str | None = setting(None, "first run of a comparison: its folder or predictions file")
    b: str | None = setting(None, "second run; the change is b minus a")
    seed: int = setting(0, "of the bootstrap")
    num_resamples: int = setting(2000, "bootstrap draws of a comparison")

    def __post_init__(self) -> None:
        """Check the numbers; which files are given is checked when the command runs."""
        check_range("seed", self.seed, low=0)
        check_range("num_resamples", self.num_resamples, low=100)


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """What came out.

    Attributes:
        report: the scores of a file, None for a comparison.
        differences: one per metric for a comparison, else empty.
        written: the JSON file written.
    """

    report: TextReport | None
    differences: tuple[Difference, ...]
    written: Path


def run(config: ScoreConfig) -> ScoreResult:
    """Score one file or compare two.

    Args:
        config: either ``predictions``, or ``a`` and ``b``.

    Returns:
        The scores; they were printed, and written next to the (second) predictions file.

    Raises:
        ConfigError: neither or both ways were asked for, or a file does not exist.
        DataError: a file cannot be read, or the two do not answer the same rows.
    """
    _check_what_is_asked(config)
    if config.predictions is not None:
        return _score_file(config.predictions, config.seed)
    assert config.a is not None
    assert config.b is not None
    return _compare(config.a, config.b, config)


def _check_what_is_asked(config: ScoreConfig) -> None:
    pair = [name for name in ("a", "b") if getattr(config, name) is not None]
    if config.predictions is not None and pair:
        raise ConfigError(
            f"`predictions` and `{pair[0]}` are both set, but one call does one thing. Use `predictions=FILE`"
            " to score a file, or `a=RUN1 b=RUN2` to compare two runs."
        )
    if config.predictions is None and len(pair) != 2:
        missing = "`predictions` is not set" if not pair else f"`{'b' if pair == ['a'] else 'a'}` is not set"
        raise ConfigError(
            f"{missing}. Use `predictions=FILE` to score a file, or `a=RUN1 b=RUN2` to compare two runs."
        )


def _score_file(given: str, seed: int) -> ScoreResult:
    from glmtune.inference.predict.match import score_predictions
    from glmtune.inference.predict.predictions import find_predictions, identity_beside, read_predictions
    from glmtune.metrics.summary import summarize
    from glmtune.metrics.tables import report_table
    from glmtune.storage.files import json_text, write_text_atomically
    from glmtune.terminal.console import Console, plain

    path = find_predictions(given, "predictions")
    predictions = read_predictions(path)
    report = summarize(score_predictions(predictions, path), seed=seed)
    console = Console()
    console.print(report_table(report, str(path)))
    identity = identity_beside(path) or {}
    expected = identity.get("num_rows")
    if isinstance(expected, int) and expected > len(predictions):
        partial = f"Partial: {len(predictions)} of {expected} rows are predicted so far."
        console.print(plain(partial, "yellow"))
    written = path.with_name(SCORE_NAME)
    values = {"file": str(path), **report.to_json()}
    write_text_atomically(written, json_text(values))
    console.print(f"Written: {written}", soft_wrap=True)
    return ScoreResult(report=report, differences=(), written=written)


def _compare(given_a: str, given_b: str, config: ScoreConfig) -> ScoreResult:
    from glmtune.inference.predict.match import match_rows, score_predictions
    from glmtune.inference.predict.predictions import find_predictions, read_predictions
    from glmtune.inference.predict.report import write_comparison
    from glmtune.metrics.significance import paired_bootstrap
    from glmtune.metrics.tables import comparison_table
    from glmtune.terminal.console import Console

    path_a, path_b = find_predictions(given_a, "a"), find_predictions(given_b, "b")
    a, b = read_predictions(path_a), read_predictions(path_b)
    match_rows(a, b, path_a, path_b)
    differences = paired_bootstrap(
        score_predictions(a, path_a),
        score_predictions(b, path_b),
        num_resamples=config.num_resamples,
        seed=config.seed,
    )
    console = Console()
    console.print(comparison_table(differences, a="a", b="b", num_rows=len(a)))
    console.print(f"a: {path_a}\nb: {path_b}", soft_wrap=True)
    for difference in differences:
        if difference.metric in ("bleu-4", "rouge-l"):
            console.print(difference.verdict("a", "b"), soft_wrap=True, highlight=False)
    written = write_comparison(
        path_b.parent,
        differences,
        a=str(path_a),
        b=str(path_b),
        num_rows=len(a),
        test=f"paired bootstrap, {config.num_resamples} resamples, seed {config.seed}",
    )
    console.print(f"Written: {written}", soft_wrap=True)
    return ScoreResult(report=None, differences=differences, written=written)


COMMAND = Command(
    name="score",
    summary="score existing predictions, or compare two runs",
    schema=ScoreConfig,
    run=run,
    bare_words=("predictions",),
    examples=(
        "glmtune score runs/ads/predict/generated_predictions.jsonl",
        "glmtune score predictions=output/generated_predictions.txt",
        "glmtune score a=runs/ads/predict/base b=runs/ads/predict",
    ),
)
