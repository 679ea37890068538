"""`glmtune data`: check a data set before training on it, fetch a benchmark, or clear encoded rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError, DataError, MissingExtraError
from glmtune.models.settings import ModelSettings
from glmtune.settings import build_settings, check_choice, setting
from glmtune.training.config import RunConfig
from recipes.words.compose import Command, given_settings, read_values

if TYPE_CHECKING:
    from glmtune.data.check import DataReport
    from glmtune.models.templates.renderer import TextTokenizer
    from glmtune.terminal.console import Console

ACTIONS = ("check", "fetch", "clear")
TUNED = ("run", "prefix_path", "adapter_path", "init_from")
"""Settings that name something whose data settings count."""


@dataclass(frozen=True)
class DataConfig(RunConfig):
    """What to check as which run would read it (``+recipe=`` fits, too); or what to fetch."""

    action: str = setting(
        "check",
        "what to do: check (a data set), fetch (the files of a benchmark), clear (delete encoded rows)",
    )
    name: str | None = setting(None, "with fetch: the benchmark, such as mmlu")
    benchmark_file: str | None = setting(
        None,
        "with check, also as `benchmark=`: the YAML file of a benchmark of your own; shows three questions,"
        " and what its rules read",
    )
    fetch_dir: str | None = setting(
        None, "with fetch: where to; default: a folder named after it under $GLMTUNE_DATA, or ./data"
    )
    run: str | None = setting(
        None, "with check: a run folder; model, files, lengths and columns are those of the run unless given"
    )
    report_file: str | None = setting(None, "also write the report to this JSON file")

    def _check_beginning(self) -> None:
        """Let anything tuned be named: only what it was trained with is read."""
        named = {name: getattr(self, name) for name in TUNED if getattr(self, name) is not None}
        if len(named) > 1:
            first, second = list(named)[:2]
            raise ConfigError(
                f"`{first}` is `{named[first]}` and `{second}` is `{named[second]}`, but rows are read "
                "as one run reads them. Leave one out."
            )

    def _check_preference(self) -> None:
        """Let pairs be checked before it is said what is to be learnt from them."""
        if self.preference is not None:
            super()._check_preference()

    def __post_init__(self) -> None:
        """Check the action, and that it reads what is given.

        Raises:
            ConfigError: it does not exist, lacks a name, or would ignore one.
        """
        super().__post_init__()
        check_choice("action", self.action, ACTIONS)
        if self.action == "fetch" and self.name is None:
            raise ConfigError(
                "`name` must be given: `glmtune data fetch NAME`, such as `glmtune data fetch mmlu`."
            )
        if self.action == "fetch" and self.benchmark_file is not None:
            raise ConfigError(
                f"`benchmark_file` is `{self.benchmark_file}`, but fetch takes names: `glmtune data fetch"
                " mmlu`. Use `glmtune data check benchmark=...`."
            )
        for key in ("name", "fetch_dir"):
            if self.action != "fetch" and (value := getattr(self, key)) is not None:
                raise ConfigError(
                    f"`{key}` is `{value}`, but `glmtune data {self.action}` reads no benchmark. Name the"
                    " data set with `data=...`, or use `glmtune data fetch`."
                )


def run(config: DataConfig, words: Sequence[str] = ()) -> DataReport | None:
    """Check a data set and show what was found, fetch a benchmark, or delete encoded rows.

    Args:
        config: the settings.
        words: overrides as they were typed: what they name stays as given, where a run says otherwise.

    Returns:
        The report shown; None after anything but a check.

    Raises:
        ConfigError: no file is given, or the report file cannot be written.
        DataError: a file cannot be read; after the report, if rows are bad and ``on_bad_row`` is ``error``.
    """
    if config.action != "check":
        _fetch(config) if config.action == "fetch" else _clear(config)
        return None
    if config.benchmark_file is not None:
        if others := sorted(given_settings(COMMAND, words) - {"action", "benchmark_file"}):
            raise ConfigError(
                f"`{others[0]}` is set, but a benchmark is checked by its file alone. Leave it out."
            )
        _check_benchmark(Path(config.benchmark_file).expanduser())
        return None
    from glmtune.data.check import check_data
    from glmtune.data.check_view import show_report
    from glmtune.data.lengths import has_lengths
    from glmtune.models.context import context_tokens
    from glmtune.models.tokenizers.load import load_tokenizer
    from glmtune.terminal.console import Console

    console = Console()
    config = _as_trained(config, words, console)
    source, family = config.model.source, config.model.family
    tokenizer = cast("TextTokenizer", load_tokenizer(source, family=family))
    context = None if has_lengths(config.data) else context_tokens(source, family)
    report = check_data(config.data, tokenizer, context=context, progress=True)
    show_report(report, console)
    if config.report_file is not None:
        _write_report(report, Path(config.report_file))
    if report.num_bad_rows and config.data.on_bad_row == "error":
        raise DataError(
            f"{report.num_bad_rows} rows cannot be used (listed above). Correct them, or train with"
            " `data.on_bad_row=skip` to leave them out."
        )
    return report


def _check_benchmark(path: Path) -> None:
    """Read a benchmark of a user's own whole, and show what it comes to."""
    from evaluation.benchmarks.own.check import check_own
    from glmtune.terminal.console import Console

    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    report = check_own(path)
    counted = ", ".join(f"{split} {count:,}" for split, count in report.splits.items())
    say(f"{report.title}: {counted} questions")
    say(f"subjects: {', '.join(f'{name} {count:,}' for name, count in report.subjects.items())}")
    if report.keys:
        say(f"keys: {', '.join(f'{letter} {count:,}' for letter, count in report.keys.items())}")
    for shown in report.shown:
        say(f"\n--- {shown.subject} ---\n{shown.prompt}\nkey: {shown.key}")
        for rule, found in shown.read.items():
            say(f"{rule} reads in the key itself: {'nothing' if found is None else found}")
        for rule, grade in shown.grades.items():
            say(f"{rule}: graded {grade:.2f} for the key itself")


def _as_trained(config: DataConfig, words: Sequence[str], console: Console) -> DataConfig:
    """Take over the data settings of the run that is named, as far as nobody said otherwise."""
    place = next((getattr(config, name) for name in TUNED if getattr(config, name) is not None), None)
    if place is None:
        return config
    from glmtune.adapter import find_adapter
    from glmtune.data.as_trained import as_trained, trained_with, trained_with_prefix
    from glmtune.prefix.checkpoint import find_prefix

    given = given_settings(COMMAND, words)
    if config.run is not None:
        config = _of_run(config, given, words)
    if config.prefix_path is not None:
        trained = trained_with_prefix(find_prefix(place))
    else:
        trained = trained_with(find_adapter(place) if config.adapter_path else Path(place).expanduser())
    if trained is None:
        raise ConfigError(
            f"`{place}` does not tell how it was trained: there is no run of glmtune, nor one of its "
            "checkpoints. Name a run folder, or leave it out and give the lengths yourself."
        )
    data, taken = as_trained(config.data, trained, [name.removeprefix("data.") for name in given])
    if taken:
        console.print(f"as in the training of {place}: {taken}\n", highlight=False, soft_wrap=True)
    return dataclasses.replace(config, data=data)


def _of_run(config: DataConfig, given: Collection[str], words: Sequence[str]) -> DataConfig:
    """Take the model and all data settings of a run, except what is given, one by one or as a group."""
    from glmtune.data.as_trained import CONFIG_FILE, run_of

    stored = read_values(COMMAND, run_of(Path(str(config.run)).expanduser()) / CONFIG_FILE)
    groups = {word.partition("=")[0] for word in words}
    replaced: dict[str, Any] = {}
    for group, schema in (("model", ModelSettings), ("data", DataSettings)):
        if group in groups:
            continue
        kept = [name.removeprefix(f"{group}.") for name in given if name.startswith(f"{group}.")]
        now = {name: getattr(getattr(config, group), name) for name in kept}
        replaced[group] = build_settings(schema, {**stored.get(group, {}), **now})
    return dataclasses.replace(config, **replaced)


def _fetch(config: DataConfig) -> None:
    """Download a benchmark and count its rows by loading every split."""
    from evaluation.benchmarks.fetch import fetch
    from evaluation.benchmarks.sources import data_root, download_of
    from evaluation.benchmarks.tasks import BENCHMARKS, make_task
    from glmtune.terminal.console import Console

    assert config.name is not None
    download, console = download_of(config.name), Console()
    folder = Path(config.fetch_dir).expanduser() if config.fetch_dir else data_root() / config.name
    files = fetch(download, folder, console)
    benchmark = BENCHMARKS[config.name]
    for split in benchmark.splits:
        # The rows alone, as no protocol asks a dev split that it shows as examples.
        rows = benchmark.load(folder, split, benchmark.subjects)
        console.print(f"{split}: {len(rows):,} questions, as many as the official files have")
    try:
        make_task(config.name, data_dir=folder)  # reads the exemplars as well
    except MissingExtraError as error:
        console.print(f"note: {error}", markup=False, highlight=False, soft_wrap=True)
    use = f"glmtune eval benchmark={config.name}" + (
        f" benchmark.data_dir={folder}" if config.fetch_dir else ""
    )
    console.print(f"Ready: {len(files)} files. Use: {use}", markup=False, highlight=False, soft_wrap=True)


def _clear(config: DataConfig) -> None:
    """Delete the encoded rows that are kept, and say how much that was."""
    from glmtune.data.encoded.cache import cache_root, clear
    from glmtune.terminal.console import Console

    try:
        root = cache_root(config.data.cache_dir)
        done = clear(root)
    except OSError as error:
        raise ConfigError(
            f"The encoded rows cannot be deleted: {error.strerror or error}. They are files: delete the"
            " folder by other means."
        ) from None
    size = f"{done.num_bytes / 1e6:,.0f} MB"
    Console().print(f"deleted {done.num_sets} sets of encoded rows ({size}) from {root}", highlight=False)


def _write_report(report: DataReport, path: Path) -> None:
    from glmtune.storage.files import write_json

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(report))
    except OSError as error:
        raise ConfigError(
            f"`report_file` is `{path}`, but it cannot be written: {error.strerror}. Name a writable place."
        ) from None


COMMAND = Command(
    name="data",
    summary="Check a data set before training on it, fetch a benchmark, or clear encoded rows.",
    schema=DataConfig,
    run=run,
    takes_words=True,
    bare_words=("action", "name"),
    examples=(
        "glmtune data check data=ads",
        "glmtune data check data=adgen data.max_source_length=96",
        "glmtune data check +recipe=ptuning_chat data=files data.train_file=mine.jsonl",
        "glmtune data check run=runs/mine",
        "glmtune data fetch mmlu",
        "glmtune data clear",
        "glmtune data check data=files data.train_file=mine.jsonl report_file=report.json",
    ),
)
