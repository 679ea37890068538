"""Measure what strengths of a prefix, or scales of a LoRA, cost and give: `glmtune dial`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from glmtune.data.settings import PREFERENCE, DataSettings
from glmtune.errors import ConfigError
from glmtune.models.settings import ModelSettings
from glmtune.retention.settings import RetentionSettings
from glmtune.settings import as_written, build_settings, check_choice, check_range, check_strength, setting
from recipes.words.compose import Command, given_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glmtune.data.conversations import ConversationSet
    from glmtune.data.dataset import EncodedSplit
    from glmtune.dial.measure import Dial
    from glmtune.dial.points import DialPoint
    from glmtune.models.load import GlmModel
    from glmtune.retention.prompts import Prompt
    from glmtune.terminal.console import Console

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
SPLIT = "validation"


@dataclass(frozen=True)
class DialConfig:
    """What is turned to which strengths, and what it is measured with."""

    model: ModelSettings = setting(ModelSettings, "the base model")
    data: DataSettings = setting(DataSettings, "the task's rows; default: those that the run evaluated on")
    retention: RetentionSettings = setting(RetentionSettings, "the general prompts")
    prefix_path: str | None = setting(None, "tuned prefix: a run folder, one of its checkpoints, or a file")
    adapter_path: str | None = setting(None, "LoRA adapter: a run folder or one of its checkpoints")
    strengths: list[float] = setting(
        lambda: list(STRENGTHS), "how much it counts, one after the other: 1 as tuned, 0 the base"
    )
    rouge: bool = setting(False, "answer the task's rows, too, and score the answers (takes longer)")
    batch_size: int = setting(16, "rows in one forward pass over whole answers")
    output_dir: str | None = setting(None, "folder of table and picture; default: `dial` in the run folder")
    resume: str = setting("auto", "auto keeps strengths that were measured, never measures all anew")

    def __post_init__(self) -> None:
        """Check what needs no file; whether anything tuned is named is checked when the command runs.

        Raises:
            ConfigError: a value is not allowed, or settings contradict each other.
        """
        if self.prefix_path is not None and self.adapter_path is not None:
            raise ConfigError(
                "`prefix_path` and `adapter_path` are both set, but a model is tuned one way. Leave one out."
            )
        if not self.strengths:
            raise ConfigError("`strengths` is empty. Name some, such as [0,0.5,1].")
        for strength in self.strengths:
            check_strength("strengths", strength)
        if len(set(self.strengths)) < len(self.strengths):
            raise ConfigError(f"`strengths` is {self.strengths}, but each may stand there once.")
        check_range("batch_size", self.batch_size, low=1)
        check_choice("resume", self.resume, ("auto", "never"))
        if self.retention.exam is not None:
            raise ConfigError(
                f"`retention.exam` is `{self.retention.exam}`, but `glmtune dial` asks no exam. Leave it out;"
                " `glmtune compare candidate.prefix_path=RUN candidate.prefix_strength=X` asks one at a"
                " strength."
            )

    @property
    def strength_name(self) -> str:
        """What the strength is called where it is set."""
        return "adapter_scale" if self.prefix_path is None else "prefix_strength"


@dataclass(frozen=True, slots=True)
class DialResult:
    """What came out.

    Attributes:
        points: by strength.
        best: the lowest loss among those that keep enough; None where none does.
        folder: holds ``dial.json`` and ``dial.png``.
    """

    points: tuple[DialPoint, ...]
    best: DialPoint | None
    folder: Path


@dataclass(frozen=True)
class _Task:
    """The task's rows: encoded, and as they were read."""

    rows: EncodedSplit
    loaded: ConversationSet
    data: DataSettings


def run(config: DialConfig, words: Sequence[str] | None = None) -> DialResult:
    """Load once, measure every strength, print and write what came out.

    Args:
        config: all settings.
        words: overrides as they were typed: what they name stays as given, where the run says otherwise.
            None: so does every data setting that is not its default.

    Returns:
        The points; the folder holds ``dial.jsonl``, ``dial.json`` and ``dial.png``.

    Raises:
        GlmtuneError: a setting, the data, the checkpoint, the prefix or the adapter cannot be used.
    """
    from glmtune.dial.points import known_points, open_dial
    from glmtune.dial.report import best_point, dial_table, write_dial
    from glmtune.loading import load_tokenizer
    from glmtune.retention.prompts import load_prompts
    from glmtune.storage.lock import lock_folder
    from glmtune.terminal.console import Console

    console = Console()
    tuned = _find_tuned(config)
    folder = Path(config.output_dir).expanduser() if config.output_dir else _default_folder(tuned)
    data = _data(config, tuned, words, console)
    tokenizer = load_tokenizer(config.model.source, family=config.model.family)
    task = _task(config, data, tokenizer)
    prompts = load_prompts(config.retention.prompts, shipped="retention", limit=config.retention.num_prompts)
    with lock_folder(folder), open_dial(folder) as journal:
        model = _load(config, tuned)
        facts = _facts(config, tuned, model, task, prompts)
        known = known_points(journal, facts, resume=config.resume)
        _announce(console, config, tuned, task, folder)
        missing = [strength for strength in config.strengths if strength not in known]
        if missing:
            dial = _dial(config, model, tokenizer, task)
            dial.prepare(folder, prompts, config.retention)
            for strength in missing:
                known[strength] = _measure(dial, strength, config.strength_name)
                journal.append(known[strength])
        points = [known[strength] for strength in sorted(config.strengths)]
        write_dial(folder, points, facts, name=config.strength_name)
    best = best_point(points, config.retention.target)
    console.print(dial_table(points, f"{tuned}", name=config.strength_name))
    for line in (_verdict(config, best), f"Written: {folder}", f"next: {_next_command(config, best)}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return DialResult(tuple(points), best, folder)


def _find_tuned(config: DialConfig) -> Path:
    """Return the file of the prefix or the folder of the adapter."""
    from glmtune.adapter import find_adapter
    from glmtune.prefix.checkpoint import find_prefix

    if config.prefix_path is not None:
        return find_prefix(config.prefix_path)
    if config.adapter_path is not None:
        return find_adapter(config.adapter_path)
    raise ConfigError(
        "`prefix_path` and `adapter_path` are not set, but there must be something tuned to turn. Name it:"
        " `glmtune dial prefix_path=RUN`."
    )


def _default_folder(tuned: Path) -> Path:
    from glmtune.data.as_trained import run_of

    folder = tuned if tuned.is_dir() else tuned.parent
    at = f"-{folder.name}" if folder.name == "best" or folder.name.startswith("checkpoint-") else ""
    return run_of(folder) / f"dial{at}"


def _data(config: DialConfig, tuned: Path, words: Sequence[str] | None, console: Console) -> DataSettings:
    """Return the data of the run, as far as nobody names others, and say so.

    Raises:
        ConfigError: neither the command nor the run says which rows; the run's come from the environment.
    """
    from glmtune.data.as_trained import as_trained, data_of_run, trained_with, trained_with_prefix

    given = _given(config, words)
    trained = trained_with_prefix(tuned) if tuned.is_file() else trained_with(tuned)
    chooses = words is not None and any(word.lstrip("+").startswith("data=") for word in words)
    stored = None if chooses or (words is None and given) else data_of_run(tuned)
    if stored is not None:
        values = {**stored, **{name: getattr(config.data, name) for name in given}}
        data = build_settings(DataSettings, values)
        said = f"data.{SPLIT}_file={data.file_of(SPLIT)}"
    elif chooses or given:
        data, said = config.data, ""
    else:
        raise ConfigError(
            f"`data` is not set, and no run beside {tuned} tells which rows it was evaluated on. Name them:"
            " `data=ads`, or `data=files data.validation_file=FILE`."
        )
    if trained is not None:
        data, taken = as_trained(data, trained, given)
        said = ", ".join(filter(None, [said, taken]))
    if said:
        console.print(f"as in the training of {tuned}: {said}", highlight=False, soft_wrap=True)
    if not data.has_validation:
        raise ConfigError(
            f"`data` has no rows for evaluation, which the task is measured on. Add `data.{SPLIT}_file=FILE`."
        )
    if data.layout == PREFERENCE:
        raise ConfigError(
            "`data.layout` is `preference`, but `glmtune dial` measures one answer to each prompt, and of"
            " these one is the worse. Name rows of the task: `data=ads`, or `data=files"
            " data.validation_file=FILE`."
        )
    return dataclasses.replace(data, packing=False)  # rows are read one by one here


def _given(config: DialConfig, words: Sequence[str] | None) -> list[str]:
    """Return the names of the data settings that somebody chose for this command."""
    if words is not None:
        names = given_settings(COMMAND, words)
        return [name.removeprefix("data.") for name in names if name.startswith("data.")]
    default = DataSettings()
    names = [item.name for item in dataclasses.fields(default)]
    return [name for name in names if getattr(config.data, name) != getattr(default, name)]


def _task(config: DialConfig, data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> _Task:
    from glmtune.data.dataset import load_conversations, load_split
    from glmtune.models.context import context_tokens

    source = config.model.source
    context = context_tokens(source, config.model.family)
    rows = load_split(data, SPLIT, cast(Any, tokenizer), context=context)
    return _Task(rows, load_conversations(rows.settings, SPLIT, warn=False), rows.settings)


def _load(config: DialConfig, tuned: Path) -> GlmModel:
    from glmtune.loading import load_tuned
    from glmtune.quantization.kernels.dispatch import prepare_for_inference

    source = config.model
    model = load_tuned(
        source.source,
        dtype=source.dtype,
        **source.where,
        family=source.family,
        quantization=source.method,
        quantization_embeddings=source.quantization_embeddings,
        prefix=None if config.prefix_path is None else tuned,
        adapter=None if config.adapter_path is None else tuned,
        # What a strength does to the tuned part shows where it applies: a switch would answer the general
        # prompts by the base at every strength, beside a loss that is the tuned part's alone.
        use_switch=False,
    )
    prepare_for_inference(model, activations=source.quantization_activations)
    return model


def _dial(config: DialConfig, model: GlmModel, tokenizer: PreTrainedTokenizerBase, task: _Task) -> Dial:
    from glmtune.dial.measure import Dial
    from glmtune.inference.predict.questions import build_questions

    longest = task.data.max_target_length
    assert longest is not None, "the rows told it"
    return Dial(
        cast(Any, model),
        tokenizer,
        task.rows,
        task_answers=[each.messages[-1].content for each in task.loaded.conversations],
        questions=build_questions(tokenizer, task.loaded, task.data) if config.rouge else (),
        batch_size=config.batch_size,
        max_new_tokens=longest,
    )


def _measure(dial: Dial, strength: float, name: str) -> DialPoint:
    from glmtune.terminal.progress import Meter

    with Meter(f"{name} {strength:g}", total=len(dial.base.answers), unit="answers", transient=True) as meter:
        return dial.measure(strength, meter.update)


def _facts(
    config: DialConfig, tuned: Path, model: GlmModel, task: _Task, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Return what decides the points; another of it is another dial."""
    from glmtune.adapter import adapter_sha256
    from glmtune.quantization.layers.embeddings import rounded_embeddings

    asked = json.dumps([[dataclasses.asdict(message) for message in each.messages] for each in prompts])
    digest = adapter_sha256(tuned) if tuned.is_dir() else hashlib.sha256(tuned.read_bytes()).hexdigest()
    names = ("max_source_length", "max_target_length", "source_prefix", "system", "loss_on")
    return {
        "strength": config.strength_name,
        "tuned_sha256": digest,
        "model_fingerprint": model.fingerprint(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_activations": config.model.quantization_activations,
        "data_fingerprint": task.rows.fingerprint,
        "num_rows": len(task.rows.lengths),
        **{name: getattr(task.data, name) for name in names},
        # Those from before there was a choice do not name these.
        **({"quantization_embeddings": embeddings} if (embeddings := rounded_embeddings(model)) else {}),
        **({} if task.data.loss_on_thoughts else {"loss_on_thoughts": False}),
        "prompts_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        "max_new_tokens": config.retention.max_new_tokens,
        "rouge": config.rouge,
    }


def _announce(console: Console, config: DialConfig, tuned: Path, task: _Task, folder: Path) -> None:
    kind = "LoRA" if config.prefix_path is None else "prefix"
    for line in (
        f"model  {config.model.described}, {kind} {tuned}",
        f"data   {task.rows.path}: {task.rows.unseen.line()}",
        f"output {folder}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _verdict(config: DialConfig, best: DialPoint | None) -> str:
    target = config.retention.target
    if best is None:
        return f"no strength keeps {100 * cast(float, target):g} % of the answers (`retention.target`)"
    among = "" if target is None else f" among those that keep at least {100 * target:g} %"
    kept = f"{100 * best.kept_frac:.1f} % of the base's answers kept"
    return f"lowest loss{among}: {config.strength_name} {best.strength:g} ({best.loss_nats:.4f}, {kept})"


def _next_command(config: DialConfig, best: DialPoint | None) -> str:
    """Word what one types next: look at the answers of one strength."""
    from glmtune.command_line import command_words, model_words

    values: Mapping[str, Any] = as_written(dataclasses.asdict(config))
    tuned = {name: values[name] for name in ("prefix_path", "adapter_path")}
    chosen = {} if best is None else {config.strength_name: f"{best.strength:g}"}
    return command_words("chat", {**tuned, **chosen, **model_words(values["model"])})


COMMAND = Command(
    name="dial",
    summary="Measure task score and retention of a prefix or LoRA at several strengths, and draw the curve.",
    schema=DialConfig,
    run=run,
    takes_words=True,
    examples=(
        "glmtune dial prefix_path=runs/ads",
        "glmtune dial prefix_path=runs/ads strengths=[0,0.25,0.5,1,1.5] rouge=true",
        "glmtune dial adapter_path=runs/lora retention.target=0.9 data.validation_file=dev.jsonl",
    ),
)
