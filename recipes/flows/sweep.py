"""`glmtune sweep`: train with several values of settings, and tell the best from the lucky."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtune.errors import ConfigError, GlmtuneError
from glmtune.settings import as_written, setting
from glmtune.sweep.settings import SweepSettings
from recipes.train import COMMAND as TRAIN
from recipes.train import TrainConfig
from recipes.words.compose import (
    Command,
    config_groups,
    given_settings,
    load_settings,
    long_forms,
    take_apart,
    words_over,
)

if TYPE_CHECKING:
    from glmtune.sweep.metrics import Metric
    from glmtune.sweep.running import Runner
    from glmtune.sweep.space import Axis, Point
    from glmtune.sweep.trials import Trial
    from glmtune.terminal.console import Console

OWN = "sweep."
FOLDER = "runs/sweep"
CHOSEN_HERE = {
    "output_dir": "every trial has a folder of its own in that of the sweep",
    "seed": "`sweep.repeats=3` trains every point with three seeds",
    "resume": "a sweep goes on by itself; to begin anew name another `output_dir`",
}
"""Settings of a run that the sweep gives every trial, and what to do instead."""
CHECKED = 64
"""Corners of its space that are checked before a search starts; of a larger space every value, in turn."""
LISTED = 6
SOME_FAILED = 5
"""Exit code: the table is written, but some trials failed."""


@dataclass(frozen=True)
class SweepConfig(TrainConfig):
    """Everything that decides a training run, and what is swept; several values are those of one setting."""

    sweep: SweepSettings = setting(SweepSettings, "what is swept, and what tells the best")


@dataclass(frozen=True)
class _Sweep:
    """What the words of a command line mean.

    Attributes:
        config: all settings, of the first point.
        folder: of the sweep.
        fixed: words that all trials have.
        axes: settings with several values.
        metric: tells the best.
        extra_configs: folder of `--config-dir`.
        composed: settings of points by point, as `train` will compose them, and their plain values.
    """

    config: SweepConfig
    folder: Path
    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    metric: Metric
    extra_configs: Path | None
    composed: dict[Point, tuple[TrainConfig, dict[str, Any]]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """Seeds of every point."""
        return [self.config.seed + number for number in range(self.config.sweep.repeats)]

    def words(self, point: Point) -> list[str]:
        """Return what the training of a point has typed, but for seed and folder."""
        return [*self.fixed, *point.words]

    def settings(self, point: Point) -> tuple[TrainConfig, dict[str, Any]]:
        """Compose a point as `train` will.

        Raises:
            ConfigError: its settings are not allowed.
        """
        if point not in self.composed:
            config = load_settings(TRAIN, self.words(point), self.extra_configs)
            self.composed[point] = config, as_written(dataclasses.asdict(config))
        return self.composed[point]

    def trial(self, point: Point, seed: int) -> Trial:
        """Make the trial of a point and a seed; it is left to `train` to refuse settings."""
        from glmtune.sweep.trials import LOGS, TRIALS, Trial, trial_name

        name = trial_name(point, seed)
        folder = self.folder / TRIALS / name
        words = (*self._config_dir, *self.words(point), f"seed={seed}", f"output_dir={folder}")
        try:
            values = {**self.settings(point)[1], "seed": seed, "output_dir": str(folder)}
        except ConfigError:
            values = {}
        return Trial(point, seed, folder, self.folder / LOGS / f"{name}.log", words, values)

    def command(self, point: Point, folder: str) -> str:
        """Word the command that trains a point by itself."""
        from glmtune.command_line import without_secrets

        words = [*self._config_dir, *self.words(point), f"seed={self.config.seed}", f"output_dir={folder}"]
        return without_secrets(["glmtune", "train", *words])

    @property
    def _config_dir(self) -> tuple[str, ...]:
        return () if self.extra_configs is None else (f"--config-dir={self.extra_configs}",)


def run(config: SweepConfig, words: Sequence[str] | None = None, extra_configs: Path | None = None) -> int:
    """Check all points, train those that are missing, and show what came out.

    Args:
        config: all settings, of the first point.
        words: overrides as they were typed, those with several values included.
        extra_configs: folder of `--config-dir`.

    Returns:
        0, or `SOME_FAILED` where the table lacks trials that failed.

    Raises:
        GlmtuneError: a point's settings are not allowed, the folder holds another sweep, nothing succeeds.
    """
    from glmtune.command_line import without_secrets
    from glmtune.sweep.running import Runner
    from glmtune.sweep.scoring import score_command
    from glmtune.sweep.trials import SCORES, known_records, open_sweep, refuse_other_runs
    from glmtune.terminal.console import Console

    sweep = _read(config, words, extra_configs)
    console = Console(highlight=False, soft_wrap=True)
    points = _check_points(sweep)
    num_trials = (
        len(points) if config.sweep.search == "grid" else config.sweep.trials
    ) * config.sweep.repeats
    _announce(sweep, console, points, num_trials)
    # Seeds go round outside: whoever looks early sees every point once.
    grid = [sweep.trial(point, seed) for seed in sweep.seeds for point in points]
    if config.sweep.dry_run:
        for trial in grid:
            console.print(f"$ {without_secrets(['glmtune', 'train', *trial.words])}")
        return 0
    with open_sweep(sweep.folder, _identity(sweep)) as journal:
        records = known_records(journal)
        runner = Runner(
            journal,
            records,
            sweep.metric,
            lambda trial: score_command(trial, sweep.metric, config.sweep.score_words, sweep.folder / SCORES),
            retry_failed=config.sweep.retry_failed,
            max_failed=config.sweep.max_failed,
        )
        if config.sweep.search == "grid":
            refuse_other_runs(grid, records)
            runner.run(grid, num_trials)
        else:
            points = _search(sweep, runner, num_trials)
        return _report(sweep, console, runner, points)


def _read(config: SweepConfig, words: Sequence[str] | None, extra_configs: Path | None) -> _Sweep:
    """Part the words into what all trials have and what is swept.

    Raises:
        ConfigError: nothing is swept, something that cannot be, or the metric is none.
    """
    from glmtune.sweep.metrics import metric_of
    from glmtune.sweep.search import require_optuna
    from glmtune.training.distributed.parent import is_started

    if words is None:
        raise ConfigError(
            "`glmtune sweep` takes no `--settings`, as a run's file has one value of every setting. Write a"
            " file with `sweep: {over: {...}}` and name it: `glmtune sweep my.yaml`."
        )
    if is_started():
        raise ConfigError(
            "`glmtune sweep` was started by a launcher (torchrun or its like), but it is one process that"
            " starts others. Start it alone; `launch.num_processes=N` is of every trial."
        )
    if config.sweep.search == "optuna":
        require_optuna()
    over = long_forms(words_over(config.sweep.over or {}), COMMAND, extra_configs)
    words = long_forms(words, COMMAND, extra_configs)
    typed = [word for word in words if not _key(word).startswith(OWN)]
    swept_own = take_apart([word for word in words if _key(word).startswith(OWN)], COMMAND, extra_configs)[1]
    twice = {_key(word) for word in over} & {_key(word) for word in typed}
    if twice:
        raise ConfigError(f"`{min(twice)}` is given and in `sweep.over`, too. Leave one out.")
    fixed, axes = take_apart([*typed, *over], COMMAND, extra_configs)
    for key in [_key(axis.key) for axis in (*swept_own, *axes)]:
        if key in CHOSEN_HERE or key.startswith(OWN):
            why = CHOSEN_HERE.get(key, "it is of the sweep as a whole")
            raise ConfigError(f"`{key}` has several values, but {why}. Give it one, or leave it out.")
    given = given_settings(COMMAND, words)
    if "resume" in given:
        raise ConfigError(f"`resume` is `{config.resume}`, but {CHOSEN_HERE['resume']}. Leave it out.")
    metric = metric_of(config.sweep.metric, [name for name in config_groups()["benchmark"] if name != "all"])
    _refuse_unused(config.sweep, metric, given)
    if not axes:
        tuned = next((name for name in ("prefix_path", "adapter_path") if name in given), None)
        dial = f" One that is tuned is measured at several strengths by `glmtune dial {tuned}=RUN`."
        raise ConfigError(
            "No setting has several values, so there is nothing to sweep. Give some, as"
            " `glmtune sweep +recipe=ptuning trainer.learning_rate=1e-3,5e-3 prefix.pre_seq_len=16,32`."
            + (dial if tuned else "")
        )
    # Recipes name a folder for one run.
    folder = Path(config.output_dir if "output_dir" in given else FOLDER)
    return _Sweep(
        config,
        folder.expanduser(),
        tuple(word for word in fixed if _key(word) not in CHOSEN_HERE),
        tuple(axes),
        metric,
        extra_configs,
    )


def _refuse_unused(settings: SweepSettings, metric: Metric, given: frozenset[str]) -> None:
    """Refuse settings that nobody would read."""
    if settings.search == "grid" and "sweep.trials" in given:
        raise ConfigError(
            f"`sweep.trials` is {settings.trials}, but `sweep.search` is `grid`, which trains every point."
            " Leave it out, or use `sweep.search=optuna`."
        )
    if settings.score_words and metric.command == "train":
        raise ConfigError(
            f"`sweep.score_words` is {settings.score_words}, but training measures `{metric.name}` itself."
            " Leave it out, or use a metric of predict or eval, such as `sweep.metric=rouge-l`."
        )


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _check_points(sweep: _Sweep) -> list[Point]:
    """Compose every point as `train` will, and ask whether the first one fits into memory.

    Returns:
        All points of a grid; of a search those with the ends of its intervals.

    Raises:
        ConfigError: a point that `train` would refuse, or that measures no such metric.
    """
    from glmtune.planning.check import check_run
    from glmtune.sweep.space import corners, grid
    from glmtune.terminal.progress import Meter
    from glmtune.terminal.text import write_error

    is_grid = sweep.config.sweep.search == "grid"
    points = grid(sweep.axes) if is_grid else corners(sweep.axes, limit=CHECKED)
    problems: list[str] = []
    with Meter("checking", total=len(points), unit="points", transient=True) as meter:
        for number, point in enumerate(points, start=1):
            try:
                _check_measured(sweep.metric, sweep.settings(point)[0], sweep.config.sweep.score_words)
            except ConfigError as error:
                problems.append(f"- {point.shown}: {error}")
            meter.update(number)
    if problems:
        more = len(problems) - LISTED
        lines = [*problems[:LISTED], *([f"- and {more} more"] if more > 0 else [])]
        raise ConfigError(f"{len(problems)} of the points cannot be trained:\n" + "\n".join(lines))
    _refuse_unlike(sweep.metric, [sweep.settings(point)[0] for point in points])
    first = sweep.settings(points[0])[0]
    if warning := check_run(first, first.plan):
        write_error(f"glmtune: the first trial may run out of memory. {warning}\n")
    return points


def _check_measured(metric: Metric, settings: TrainConfig, score_words: Sequence[str]) -> None:
    """Refuse a metric that neither a run nor what scores it would measure.

    Raises:
        ConfigError: see above.
    """
    if metric.is_measured_on_rows and not settings.data.has_validation:
        raise ConfigError(
            f"`sweep.metric` is `{metric.name}`, but no rows are kept for evaluation. Add"
            " `data.validation_file=FILE` or `data.validation_frac=0.1`, or use `sweep.metric=train_loss`."
        )
    names_rows = "data.validation_file" in map(_key, score_words)
    if metric.command == "predict" and settings.data.mix is not None and not names_rows:
        raise ConfigError(
            f"`sweep.metric` is `{metric.name}`, but `data.mix` names several data sets, and `predict`"
            " answers the rows of one. Name it, `sweep.score_words=[data.validation_file=FILE]`, or use"
            " `sweep.metric=eval_loss`."
        )
    if (
        metric.name in ("eval_retention", "eval_retention_kl", "eval_leak_rate")
        and settings.retention is None
    ):
        raise ConfigError(
            f"`sweep.metric` is `{metric.name}`, but `retention` is null, so nobody measures it. Leave"
            " `retention=null` out."
        )


def _refuse_unlike(metric: Metric, points: Sequence[TrainConfig]) -> None:
    """Refuse a figure that means something else at other points: losses of preferences are of their settings.

    Raises:
        ConfigError: see above.
    """
    preferences = [settings.preference for settings in points]
    if metric.command != "train" or not any(preferences):
        return
    way = ""
    if metric.name.endswith("loss"):
        kinds, why = set(preferences), "whose values say nothing of each other"
        way = "; with a reference at all points also `sweep.metric=eval_accuracy`"
    elif metric.name.endswith("accuracy"):
        kinds = {preference and preference.has_reference for preference in preferences}
        why = "and accuracy is of pairs, measured against a reference or without one, or of tokens"
    else:
        return
    if len(kinds) > 1:
        raise ConfigError(
            f"`sweep.metric` is `{metric.name}`, but the points learn by different losses (`preference`),"
            f" {why}. Use a score of their answers, such as `sweep.metric=rouge-l`, or a benchmark{way}."
        )


def _announce(sweep: _Sweep, console: Console, points: Sequence[Point], num_trials: int) -> None:
    from glmtune.tables import named_values

    way = "highest" if sweep.metric.is_larger_better else "lowest"
    search = (
        "all points of a grid" if sweep.config.sweep.search == "grid" else "points chosen by Optuna (TPE)"
    )
    repeats = sweep.config.sweep.repeats
    seeds = "1 seed" if repeats == 1 else f"{repeats} seeds"
    num_points = num_trials // repeats
    rows = [
        *((axis.key, _values(axis)) for axis in sweep.axes),
        ("trials", f"{num_trials} = {num_points} points x {seeds}, {search}"),
        ("best", f"the {way} {sweep.metric.name}"),
        ("folder", str(sweep.folder)),
        ("first", sweep.command(points[0], f"{sweep.folder}/...")),
    ]
    console.print(named_values(rows))


def _values(axis: Axis) -> str:
    from glmtune.sweep.space import Choices

    if isinstance(axis, Choices):
        return ", ".join(axis.values)
    ends = f"{axis.written(axis.low)} to {axis.written(axis.high)}"
    return f"{ends}{', by its logarithm' if axis.is_log else ''}{', whole' if axis.is_int else ''}"


def _identity(sweep: _Sweep) -> dict[str, object]:
    """Return what another command must have in common to go on with the sweep."""
    settings = sweep.config.sweep
    identity: dict[str, object] = {
        "settings": sorted(_key(axis.key) for axis in sweep.axes),
        "search": settings.search,
    }
    if settings.search == "optuna":  # whose study has learnt from figures of this kind alone
        identity |= {
            "space": {axis.key: _values(axis) for axis in sweep.axes},
            "metric": sweep.metric.name,
            "repeats": settings.repeats,
            "seed": sweep.config.seed,
        }
    return identity


def _search(sweep: _Sweep, runner: Runner, num_trials: int) -> list[Point]:
    """Let Optuna choose, train what it chooses, and return the points."""
    from glmtune.sweep.search import STUDY_FILE, OptunaSearch
    from glmtune.sweep.trials import refuse_other_runs

    search = OptunaSearch(
        sweep.folder / STUDY_FILE,
        sweep.axes,
        larger_is_better=sweep.metric.is_larger_better,
        seed=sweep.config.seed,
    )
    chosen: dict[Point, None] = {}

    def told(point: Point) -> float | None:
        result = runner.result(point, sweep.seeds)
        return None if result.failed else result.mean

    def trials() -> Iterator[Trial]:
        for point in search.points(sweep.config.sweep.trials, told):
            chosen[point] = None
            for seed in sweep.seeds:
                trial = sweep.trial(point, seed)
                refuse_other_runs([trial], runner.records)
                yield trial

    runner.run(trials(), num_trials)
    return list(chosen)


def _report(sweep: _Sweep, console: Console, runner: Runner, points: Sequence[Point]) -> int:
    """Print and write the table, and what to type next."""
    from glmtune.sweep.report import failures, sweep_table, verdict, write_sweep
    from glmtune.sweep.statistics import rank
    from glmtune.sweep.trials import TRIALS, trial_name

    metric = sweep.metric
    results = [runner.result(point, sweep.seeds) for point in points]
    ranking = rank(results, larger_is_better=metric.is_larger_better)
    title = f"{sweep.folder}: {len(points)} points"
    commands: dict[str, str] = {}
    if (best := ranking.best) is not None:
        name = trial_name(best.point, min(best.by_seed))
        commands = {
            "train the best": sweep.command(best.point, str(sweep.folder / "best")),
            "already trained": str(sweep.folder / TRIALS / name),
        }
    written = write_sweep(sweep.folder, ranking, metric, runner.records, title=title, commands=commands)
    table = sweep_table(ranking, metric, title)
    # The caption is a sentence: under a table in parts it would be as narrow as the last one.
    dataclasses.replace(table, caption="").show(console)
    for line in (table.caption, *failures(ranking.results), *verdict(ranking, metric)):
        console.print(line)
    console.print(f"Written: {', '.join(str(path) for path in written)}")
    if best is None:
        raise GlmtuneError(f"No trial has a figure; logs are in {sweep.folder / 'logs'}.")
    console.print(f"already trained: {commands['already trained']}")
    console.print(f"next: {commands['train the best']}")
    return SOME_FAILED if any(result.failed for result in results) else 0


COMMAND = Command(
    name="sweep",
    summary="Train with several values of settings, by a grid or Optuna, and tell the best from the lucky.",
    schema=SweepConfig,
    run=run,
    takes_several=True,
    examples=(
        "glmtune sweep +recipe=ptuning trainer.learning_rate=1e-3,5e-3,2e-2 prefix.pre_seq_len=16,32",
        "glmtune sweep +recipe=ptuning,lora trainer.max_steps=200 sweep.repeats=3 output_dir=runs/methods",
        "glmtune sweep +recipe=lora sweep.search=optuna 'trainer.learning_rate=tag(log,interval(1e-4,1e-2))'"
        " lora.rank=4,8,16 sweep.trials=20",
        "glmtune sweep +recipe=ptuning prefix.pre_seq_len=16,32 sweep.metric=rouge-l",
    ),
)
