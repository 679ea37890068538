"""`glmtune plan`: memory by part, the cheapest setting that fits, time per epoch; before anything loads."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmtune.errors import ConfigError, GlmtuneError
from glmtune.settings import check_choice, check_range, setting
from glmtune.training.config import RunConfig
from recipes.words.compose import Command

if TYPE_CHECKING:
    from glmtune.planning.check import Plan
    from glmtune.planning.probe import Probe

FORMATS = ("table", "json")
OWN = ("hardware", "sequence_length", "probe", "format")
DOES_NOT_FIT = 3
"""Exit code where a setting needs more memory than there is."""


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """The settings of a run, and where it would run."""

    hardware: str | None = setting(
        None,
        "4x80GB, 1x8GB, 2x8x80GB (machines x GPUs), 4x80GB+512GB (host memory), cpu:24GB; null: this machine",
    )
    sequence_length: int | None = setting(
        None, "tokens of the longest row; null: as long as the data settings allow"
    )
    probe: bool = setting(False, "time two steps on this machine, for the time of an epoch")
    format: str = setting("table", "table, or json for programs")

    def __post_init__(self) -> None:
        """Check what the plan adds.

        Raises:
            ConfigError: a value is out of range, or the probe is to measure another machine.
        """
        super().__post_init__()
        check_choice("format", self.format, FORMATS)
        if self.sequence_length is not None:
            check_range("sequence_length", self.sequence_length, low=2)
        if self.probe and self.hardware is not None:
            raise ConfigError(
                f"`probe` is true and `hardware` is `{self.hardware}`, but the probe measures this machine. "
                "Leave `hardware` out, or `probe`."
            )


@dataclass(frozen=True)
class Epoch:
    """One pass over the training rows.

    Attributes:
        rows: training rows.
        mean_length: tokens of a row on average.
        steps: optimizer steps.
        seconds: at the measured speed.
    """

    rows: int
    mean_length: float
    steps: int
    seconds: float


def run(config: PlanConfig, words: Sequence[str] = ()) -> int:
    """Reckon and print.

    Args:
        config: all settings.
        words: overrides as they were typed, to be repeated in the command that is recommended.

    Returns:
        0 if the setting fits, else 3.

    Raises:
        GlmtuneError: unknown model or hardware, settings that contradict each other, or no probe possible.
    """
    from glmtune.planning.check import make_plan, memory_problem

    plan = make_plan(config, config.hardware, length=config.sequence_length)
    problem = memory_problem(plan)
    command = _command(plan, words)
    probe = epoch = None
    if config.probe:
        probe, epoch = _probe(config, plan)
    if config.format == "json":
        _print_json(plan, command, probe, epoch, problem)
    else:
        _print_tables(plan, command, probe, epoch, problem)
    return 0 if plan.fits else DOES_NOT_FIT


def _command(plan: Plan, words: Sequence[str]) -> list[str]:
    """Return the command line of the cheapest setting that fits; what was typed stays, changes follow."""
    if plan.best is None:
        return []
    changed = {override.partition("=")[0] for override in plan.best.overrides}
    # One setting by three names: whichever was typed gives way to the one that is proposed.
    changed |= (
        {"model.quantization", "quantization_bit", "model.quantization_bit"}
        if "quantization" in changed
        else set()
    )
    names = {word: word.lstrip("+").partition("=")[0] for word in words}
    kept = [word for word, name in names.items() if name not in {*OWN, *changed}]
    if "deepspeed" in changed:  # another way of sharding replaces all that was set of the old one
        kept = [word for word in kept if not names[word].startswith("deepspeed.")]
    return ["glmtune", "train", *kept, *plan.best.overrides]


def _probe(config: PlanConfig, plan: Plan) -> tuple[Probe, Epoch | None]:
    from glmtune.planning.probe import measure_steps

    lengths = _lengths(config)
    if not lengths:
        return measure_steps(plan), None
    mean = sum(lengths) / len(lengths)
    # At the mean length, for an epoch has rows of all lengths; memory is reckoned for the longest.
    probe = measure_steps(plan, length=max(8, round(mean)))
    batch = plan.work.batch
    per_step = batch.rows * batch.accumulation * plan.work.sharding.num_processes
    steps = -(-len(lengths) // per_step)
    return probe, Epoch(len(lengths), mean, steps, steps * probe.step_seconds)


def _lengths(config: PlanConfig) -> list[int]:
    """Return the tokens of every training row; none where rows or tokenizer are not on this machine."""
    from glmtune.data.dataset import load_split
    from glmtune.models.tokenizers.base import GlmTokenizer
    from glmtune.models.tokenizers.load import load_tokenizer
    from glmtune.planning.lengths import is_here

    if not is_here(config):
        return []
    try:
        tokenizer = load_tokenizer(config.model.source, family=config.model.family)
        assert isinstance(tokenizer, GlmTokenizer)
        return [int(length) for length in load_split(config.data, "train", tokenizer).lengths]
    except GlmtuneError:
        return []


def _print_json(
    plan: Plan, command: list[str], probe: Probe | None, epoch: Epoch | None, problem: str
) -> None:
    import dataclasses

    from glmtune.planning.report import plain_values

    values = plain_values(plan, command, probe, problem=problem)
    values["epoch"] = None if epoch is None else dataclasses.asdict(epoch)
    from glmtune.storage.files import json_text
    from glmtune.terminal.text import write

    write(json_text(values))


def _print_tables(
    plan: Plan, command: list[str], probe: Probe | None, epoch: Epoch | None, problem: str
) -> None:
    from glmtune.planning.report import memory_table, published_table, summary_rows, time_rows
    from glmtune.tables import named_values
    from glmtune.terminal.console import Console

    console = Console(highlight=False)
    console.print(named_values(summary_rows(plan)))
    console.print(memory_table(plan))
    reports = published_table(plan)
    if reports is not None:
        console.print(reports)
    if probe is not None:
        seconds = None if epoch is None else (epoch.rows, epoch.mean_length, epoch.steps, epoch.seconds)
        console.print(named_values(time_rows(plan, probe, seconds), title="time, measured"))
    wide = Console(highlight=False, soft_wrap=True)
    for note in plan.notes:
        wide.print(f"note: {note}", markup=False)
    wide.print("fits" if plan.fits else problem, markup=False)
    if plan.best is not None:
        total = plan.best.estimate.device.total / 2**30
        label = "this is the cheapest setting that fits" if not plan.best.overrides else "cheapest that fits"
        note = "; changes what is learnt" if plan.best.changes_results else ""
        wide.print(f"{label} ({total:.1f} GiB{note}):", markup=False)
        wide.print("  " + shlex.join(command), markup=False)


COMMAND = Command(
    name="plan",
    summary="Say what memory and time a run will need, and the cheapest setting that fits, before it starts.",
    schema=PlanConfig,
    run=run,
    takes_words=True,
    examples=(
        "glmtune plan model=chatglm2-6b +recipe=full hardware=4x80GB",
        "glmtune plan model=chatglm2-6b +recipe=ptuning quantization=int4 hardware=1x8GB",
        "glmtune plan +recipe=ptuning probe=true",
        "glmtune plan model=glm-4-9b +recipe=lora hardware=1x24GB sequence_length=8192 format=json",
    ),
)
