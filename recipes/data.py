"""`glmtune data`: check a data set before training on it, or fetch a benchmark."""

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
    from glmtune.models.templates.renderer import TextTokenizer

ACTIONS = ("check", "fetch")


@dataclass(frozen=True)
class DataConfig:
    """What to check, and with whose tokenizer; or what to fetch."""

    action: str = setting(
        "check", "what to do: check (a data set), fetch (the official files of a benchmark)"
    )
    name: str | None = setting(None, "with fetch: the benchmark, such as mmlu")
    fetch_dir: str | None = setting(
        None, "with fetch: where to; default: a folder named after it under $GLMTUNE_DATA, or ./data"
    )
    model: ModelSettings = setting(ModelSettings, "the base model whose tokenizer and template count")
    data: DataSettings = setting(DataSettings, "the data set")
    report_file: str | None = setting(None, "also write the report to this JSON file")

    def __post_init__(self) -> None:
        """Check the action, and that it reads what is given.

        Raises:
            ConfigError: it does not exist, lacks a name, or would ignore one.
        """
        check_choice("action", self.action, ACTIONS)
        if self.action == "fetch" and self.name is None:
            raise ConfigError(
                "`name` must be given: `glmtune data fetch NAME`, such as `glmtune data fetch mmlu`."
            )
        for key in ("name", "fetch_dir"):
            if self.action == "check" and (value := getattr(self, key)) is not None:
                raise ConfigError(
                    f"`{key}` is `{value}`, but `glmtune data check` reads no benchmark. Name the data set"
                    " with `data=...`, or use `glmtune data fetch`."
                )


def run(config: DataConfig) -> DataReport | None:
    """Check a data set and show what was found, or fetch a benchmark.

    Args:
        config: the settings.

    Returns:
        The report shown; None after fetching.

    Raises:
        ConfigError: no file is given, or the report file cannot be written.
        DataError: a file cannot be read; after the report, if rows are bad and ``on_bad_row`` is ``error``.
    """
    if config.action == "fetch":
        _fetch(config)
        return None
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


def _fetch(config: DataConfig) -> None:
    """Download a benchmark and count its rows by loading every split."""
    from rich.console import Console

    from evaluation.benchmarks.fetch import fetch
    from evaluation.benchmarks.sources import data_root, download_of
    from evaluation.benchmarks.tasks import BENCHMARKS, make_task

    assert config.name is not None
    download, console = download_of(config.name), Console()
    folder = Path(config.fetch_dir).expanduser() if config.fetch_dir else data_root() / config.name
    files = fetch(download, folder, console)
    for split in BENCHMARKS[config.name].splits:
        task = make_task(config.name, split=split, data_dir=folder)
        console.print(f"{split}: {len(task.samples):,} questions, as many as the official files have")
    use = f"glmtune eval benchmark={config.name}" + (
        f" benchmark.data_dir={folder}" if config.fetch_dir else ""
    )
    console.print(f"Ready: {len(files)} files. Use: {use}", markup=False, highlight=False, soft_wrap=True)


def _write_report(report: DataReport, path: Path) -> None:
    import dataclasses

    from glmtune.files import write_json

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(report))
    except OSError as error:
        raise ConfigError(
            f"`report_file` is `{path}`, but it cannot be written: {error.strerror}. Name a writable place."
        ) from None


COMMAND = Command(
    name="data",
    summary="Check a data set before training on it, or fetch the official files of a benchmark.",
    schema=DataConfig,
    run=run,
    bare_words=("action", "name"),
    examples=(
        "glmtune data check data=ads",
        "glmtune data check data=adgen data.max_source_length=96",
        "glmtune data fetch mmlu",
        "glmtune data check data=files data.train_file=mine.jsonl report_file=report.json",
    ),
)
