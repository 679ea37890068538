"""`glmtune data check`: look at a data set before training on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError, DataError
from glmtune.models.settings import ModelSettings
from glmtune.settings import check_choice, setting
from recipes.compose import Command

if TYPE_CHECKING:
    from glmtune.data.check import DataReport
    from glmtune.models.templates import TextTokenizer

ACTIONS = ("check",)


@dataclass(frozen=True)
class DataCheckConfig:
    """What to check, and with whose tokenizer."""

    action: str = setting("check", "what to do: check")
    model: ModelSettings = setting(ModelSettings, "the base model whose tokenizer and template count")
    data: DataSettings = setting(DataSettings, "the data set")
    report_file: str | None = setting(None, "also write the report to this JSON file")

    def __post_init__(self) -> None:
        """Check the action."""
        check_choice("action", self.action, ACTIONS)


def run(config: DataCheckConfig) -> DataReport:
    """Check a data set and show what was found.

    Args:
        config: the settings.

    Returns:
        The report shown.

    Raises:
        ConfigError: no file is given, or the report file cannot be written.
        DataError: a file cannot be read; after the report, if rows are bad and ``on_bad_row`` is ``error``.
    """
    from rich.console import Console

    from glmtune.data.check import check_data
    from glmtune.data.check_view import show_report
    from glmtune.loading import load_tokenizer

    tokenizer = cast("TextTokenizer", load_tokenizer(config.model.source, family=config.model.family))
    report = check_data(config.data, tokenizer, progress=True)
    show_report(report, Console())
    if config.report_file is not None:
        _write_report(report, Path(config.report_file))
    if report.num_bad_rows and config.data.on_bad_row == "error":
        raise DataError(
            f"{report.num_bad_rows} rows cannot be used (listed above). Correct them, or train with"
            " `data.on_bad_row=skip` to leave them out."
        )
    return report


def _write_report(report: DataReport, path: Path) -> None:
    import dataclasses
    import json

    text = json.dumps(dataclasses.asdict(report), ensure_ascii=False, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"`report_file` is `{path}`, but it cannot be written: {error.strerror}. Name a writable place."
        ) from None


COMMAND = Command(
    name="data",
    summary="Check a data set before training on it.",
    schema=DataCheckConfig,
    run=run,
    bare_word="action",
    examples=(
        "glmtune data check data=ads",
        "glmtune data check data=adgen data.max_source_length=96",
        "glmtune data check data=files data.train_file=mine.jsonl report_file=report.json",
    ),
)
