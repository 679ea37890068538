"""Generate answers for a data set and score them: `glmtune predict`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from glmtune.data.settings import SPLITS, DataSettings
from glmtune.errors import ConfigError
from glmtune.inference.settings import DraftSettings, GenerationSettings
from glmtune.models.settings import ModelSettings
from glmtune.settings import (
    SCALE_HELP,
    STRENGTH_HELP,
    as_written,
    check_choice,
    check_strengths,
    setting,
)
from glmtune.storage.names import last_part, portable_name
from recipes.words.compose import Command, given_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from glmtune.data.conversations import ConversationSet
    from glmtune.data.truncation import Unseen
    from glmtune.inference.predict.predict import PredictedSplit
    from glmtune.inference.predict.questions import Question
    from glmtune.inference.predict.run_identity import RunIdentity
    from glmtune.metrics.significance import Difference
    from glmtune.models.load import GlmModel
    from glmtune.models.templates.renderer import TextTokenizer
    from glmtune.storage.journal import Journal
    from glmtune.terminal.console import Console


@dataclass(frozen=True)
class PredictConfig:
    """What to answer, with which model, and where the answers go."""

    model: ModelSettings = setting(ModelSettings, "the base model")
    data: DataSettings = setting(DataSettings, "the questions and reference answers")
    generation: GenerationSettings = setting(GenerationSettings, "how answers are generated")
    draft: DraftSettings = setting(DraftSettings, "a smaller model that drafts tokens for it")
    prefix_path: str | None = setting(
        None,
        "tuned prefix: a run folder, one of its checkpoints, or a file (also the official pytorch_model.bin)",
    )
    prefix_strength: float = setting(1.0, STRENGTH_HELP)
    adapter_path: str | None = setting(None, "LoRA adapter: a run folder or one of its checkpoints")
    adapter_scale: float = setting(1.0, SCALE_HELP)
    use_switch: bool = setting(
        True, "obey the switch of what was tuned, if it has one; false: it applies to every prompt"
    )
    pre_seq_len: int | None = setting(
        None, "length the prefix must have, in tokens; it is read from the file"
    )
    split: str = setting(
        "test", "which rows: test (else validation, if no test file is given), validation, train"
    )
    compare_base: bool = setting(False, "answer with the untuned base as well, and compare before and after")
    output_dir: str | None = setting(
        None, "folder of the answers; default: `predict` in the run folder of what was tuned"
    )
    resume: str = setting("auto", "auto goes on where a run stopped, never deletes its rows and starts again")

    def __post_init__(self) -> None:
        """Check what needs no file."""
        check_choice("split", self.split, SPLITS)
        check_choice("resume", self.resume, ("auto", "never"))
        if self.prefix_path is not None and self.adapter_path is not None:
            raise ConfigError(
                "`prefix_path` and `adapter_path` are both set, but a model is tuned one way. Leave one out."
            )
        check_strengths(
            prefix=self.prefix_path,
            prefix_strength=self.prefix_strength,
            adapter=self.adapter_path,
            adapter_scale=self.adapter_scale,
        )
        if self.pre_seq_len and self.prefix_path is None:
            raise ConfigError(
                f"`pre_seq_len` is {self.pre_seq_len}, but no prefix is given. Add `prefix_path=RUN`, or"
                " leave `pre_seq_len` out."
            )
        if not self.use_switch and self.prefix_path is None and self.adapter_path is None:
            raise ConfigError(
                "`use_switch` is False, but nothing that was tuned is given, which could have a switch. Leave"
                " it out."
            )
        if self.draft.source is not None and self.generation.num_beams > 1:
            raise ConfigError(f"`draft.source` is `{self.draft.source}`, but beams take none. Leave it out.")
        if self.compare_base and self.prefix_path is None and self.adapter_path is None:
            raise ConfigError(
                "`compare_base` is True, but no prefix is given and no adapter. Add `prefix_path=RUN` or"
                " `adapter_path=RUN`, or leave `compare_base` out."
            )


@dataclass(frozen=True, slots=True)
class PredictResult:
    """What came out.

    Attributes:
        tuned: with the prefix or adapter, or of the base if none is given.
        base: of the untuned base, if asked for.
        differences: paired comparison of the two, one per metric; else empty.
    """

    tuned: PredictedSplit
    base: PredictedSplit | None
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class _Tuning:
    """What is in the model beside its base: its name, what identifies it, and how to run without it once."""

    name: str = "not tuned"
    identity: Mapping[str, Any] = field(default_factory=dict)
    base_alone: AbstractContextManager[None] = field(default_factory=nullcontext)


@dataclass(frozen=True)
class _Asked:
    """What is asked: the rows read, their questions, what of them is cut or unread, who chose the lengths."""

    loaded: ConversationSet
    questions: list[Question]
    unseen: Unseen
    chosen_lengths: str


def run(config: PredictConfig, words: Sequence[str] | None = None) -> PredictResult:
    """Load, generate, score, and print what came out.

    Args:
        config: all settings.
        words: overrides as they were typed: what they name stays as given, where a run says otherwise. None:
            so does every data setting that is not its default.

    Returns:
        The answers and scores; the folder holds ``generated_predictions.jsonl`` and ``predict_results.json``.

    Raises:
        GlmtuneError: a setting, the data, the checkpoint, the prefix or the adapter cannot be used.
    """
    from glmtune.inference.load_draft import load_draft
    from glmtune.inference.predict.predict import predict_split
    from glmtune.inference.predict.run_identity import BASE_FOLDER, open_journal
    from glmtune.loading import load_base, load_tokenizer
    from glmtune.quantization.kernels.dispatch import prepare_for_inference
    from glmtune.storage.lock import lock_folder
    from glmtune.terminal.console import Console

    console = Console()
    tuned_path = _find_tuned(config)
    folder = (
        Path(config.output_dir).expanduser() if config.output_dir else _default_folder(config, tuned_path)
    )
    config = _as_trained(config, tuned_path, words, console)
    tokenizer = load_tokenizer(config.model.source, family=config.model.family)
    config, asked = _questions(config, tokenizer)
    # Held to the end, and before a second model would be put beside that of another process.
    with lock_folder(folder), open_journal(folder) as journal:
        source = config.model
        model = load_base(
            source.source,
            dtype=source.dtype,
            **source.where,
            family=source.family,
            quantization=source.method,
            quantization_embeddings=source.quantization_embeddings,
        )
        model.use_switch = config.use_switch
        tuning = _tune(config, model, tuned_path)
        prepare_for_inference(model, activations=source.quantization_activations)
        draft = load_draft(config.draft, source)
        _announce(console, config, asked, tuning, folder)

        def predict(into: Journal, tuning: _Tuning) -> PredictedSplit:
            return predict_split(
                model,
                tokenizer,
                asked.questions,
                config.generation,
                journal=into,
                identity=_identity(config, model, asked, tuning),
                resume=config.resume,
                facts={"unseen": asked.unseen.values()},
                progress=True,
                draft=draft,
            )

        base = None
        if config.compare_base:
            with open_journal(folder / BASE_FOLDER) as base_journal, tuning.base_alone:
                base = predict(base_journal, _Tuning())
        tuned = predict(journal, tuning)
        differences = _report(console, tuned, base)
        console.print(f"next: {_next_command(config)}", markup=False, highlight=False, soft_wrap=True)
    return PredictResult(tuned=tuned, base=base, differences=differences)


def _as_trained(
    config: PredictConfig, tuned: Path | None, words: Sequence[str] | None, console: Console
) -> PredictConfig:
    """Take over what shaped the prompts of the run that tuned the model, and say so."""
    from glmtune.data.as_trained import as_trained, trained_with, trained_with_prefix

    given = _given(config, words)
    data, generation = config.data, config.generation
    if _is_default_layout(config, words, given):
        data = dataclasses.replace(data, layout="auto")
    place = tuned or Path(config.model.source).expanduser()
    if place.is_file():
        trained, place = trained_with_prefix(place), place.parent
    else:  # an adapter, or a model that is tuned itself
        trained = trained_with(place) if place.is_dir() else None
    if trained is not None:
        data, taken = as_trained(data, trained, [name.removeprefix("data.") for name in given])
        if taken:
            line = f"as in the training of {place}: {taken}"
            console.print(line, highlight=False, soft_wrap=True)
    if "generation.max_new_tokens" not in given:  # as long as a reference may be
        generation = dataclasses.replace(generation, max_new_tokens=data.max_target_length)
    return dataclasses.replace(config, data=data, generation=generation)


def _is_default_layout(config: PredictConfig, words: Sequence[str] | None, given: Collection[str]) -> bool:
    """Whether a file is named, and the layout is that of the data set which is there when none is."""
    chooses = words is None or any(word.lstrip("+").startswith("data=") for word in words)
    return not chooses and f"data.{config.split}_file" in given and "data.layout" not in given


def _given(config: PredictConfig, words: Sequence[str] | None) -> Collection[str]:
    """Return the paths of the settings that somebody chose for this prediction."""
    if words is not None:
        return given_settings(COMMAND, words)
    default = DataSettings()
    names = [item.name for item in dataclasses.fields(default)]
    given = [f"data.{name}" for name in names if getattr(config.data, name) != getattr(default, name)]
    return [*given, "generation.max_new_tokens"]


def _questions(config: PredictConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PredictConfig, _Asked]:
    """Read the questions; lengths that nothing tells become those of the data."""
    from glmtune.data.dataset import load_conversations
    from glmtune.data.lengths import chosen_words, has_lengths, prediction_lengths, resolve_lengths
    from glmtune.data.truncation import Unseen, count_truncation
    from glmtune.inference.predict.questions import build_questions
    from glmtune.models.context import context_tokens

    data, source = config.data, config.model.source
    loaded = load_conversations(data, config.split, need_answers=False)
    if not has_lengths(data):
        context = context_tokens(source, config.model.family)
        rows = prediction_lengths(loaded.conversations, cast("TextTokenizer", tokenizer), data)
        data = resolve_lengths(data, rows, context=context)
    questions = build_questions(tokenizer, loaded, data)
    left_out = len(loaded.bad) + len(loaded.conversations) - len(questions)
    unseen = Unseen(len(questions), count_truncation(questions), loaded.unused_columns, left_out)
    generation = config.generation
    if generation.max_new_tokens is None:
        generation = dataclasses.replace(generation, max_new_tokens=data.max_target_length)
    chosen = chosen_words(config.data, data)
    config = dataclasses.replace(config, data=data, generation=generation)
    return config, _Asked(loaded, questions, unseen, chosen)


def _find_tuned(config: PredictConfig) -> Path | None:
    """Return the file of the prefix or the folder of the adapter, None for a base model."""
    from glmtune.adapter import find_adapter
    from glmtune.prefix.checkpoint import find_prefix

    if config.adapter_path is not None:
        return find_adapter(config.adapter_path)
    return None if config.prefix_path is None else find_prefix(config.prefix_path)


def _tune(config: PredictConfig, model: PreTrainedModel, path: Path | None) -> _Tuning:
    """Put the prefix or the adapter into the model."""
    from glmtune.adapter import adapter_sha256, load_adapter
    from glmtune.prefix.attach import attach_prefix, without_prefix
    from glmtune.prefix.checkpoint import load_prefix

    if path is None:
        return _Tuning()
    if config.adapter_path is not None:
        scale = config.adapter_scale
        adapted = load_adapter(path, model, scale=scale)
        identity = {"adapter": str(path), "adapter_sha256": adapter_sha256(path), "adapter_scale": scale}
        identity |= _switch_identity(config, adapted)
        at = "" if scale == 1 else f" at scale {scale:g}"
        return _Tuning(f"adapter {path}{at}{_switch_words(model)}", identity, _base_of(adapted))
    prefix = load_prefix(path, model)
    length = prefix.pre_seq_len
    if config.pre_seq_len not in (None, length):
        raise ConfigError(
            f"`pre_seq_len` is {config.pre_seq_len}, but the prefix {path} has length {length}. Leave"
            " `pre_seq_len` out (the file tells), or give another prefix."
        )
    strength = config.prefix_strength
    attach_prefix(model, prefix, strength=strength)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    identity = {"prefix": str(path), "prefix_sha256": digest, "pre_seq_len": length}
    identity |= {"prefix_strength": strength}
    at = "" if strength == 1 else f" at strength {strength:g}"
    identity |= _switch_identity(config, model)
    name = f"prefix {path} ({length} tokens){at}{_switch_words(model)}"
    return _Tuning(name, identity, without_prefix(model))


def _switch_identity(config: PredictConfig, model: Any) -> dict[str, Any]:
    """Return what tells apart the answers with a switch that is there from those without."""
    return {} if config.use_switch or not _has_switch(model) else {"use_switch": False}


def _has_switch(model: Any) -> bool:
    from glmtune.models.architectures.unwrap import unwrapped
    from glmtune.switch.model import switch_of

    base = unwrapped(model)
    obeyed, base.use_switch = base.use_switch, True
    try:
        return switch_of(base) is not None
    finally:
        base.use_switch = obeyed


def _switch_words(model: Any) -> str:
    from glmtune.switch.model import switch_of

    return "" if switch_of(model) is None else ", with its switch"


@contextmanager
def _base_of(adapted: Any) -> Generator[None]:
    """Run a block with the base of a model with an adapter, whose switch then has nothing to decide."""
    base = adapted.get_base_model()
    obeyed, base.use_switch = base.use_switch, False
    try:
        with adapted.disable_adapter():
            yield
    finally:
        base.use_switch = obeyed


def _default_folder(config: PredictConfig, tuned: Path | None) -> Path:
    """Return `predict` in the run folder of what was tuned, or a folder under `runs` for a base model."""
    if tuned is None:
        return Path("runs") / f"predict-base-{portable_name(last_part(str(config.model.source)))}"
    folder = tuned if tuned.is_dir() else tuned.parent
    at = "" if config.prefix_strength == 1 else f"-strength-{config.prefix_strength:g}"
    at = at if config.adapter_scale == 1 else f"-scale-{config.adapter_scale:g}"
    at += "" if config.use_switch else "-without-switch"
    if folder.name == "last":
        return folder.parent / f"predict{at}"
    if folder.name == "best" or folder.name.startswith("checkpoint-"):
        return folder.parent / f"predict-{folder.name}{at}"
    return folder / f"predict{at}"


def _identity(
    config: PredictConfig,
    model: GlmModel,
    asked: _Asked,
    tuning: _Tuning,
) -> RunIdentity:
    from glmtune.inference.predict.run_identity import RunIdentity, deciding_settings
    from glmtune.models.templates.renderer import template_for
    from glmtune.quantization.layers.embeddings import rounded_embeddings
    from glmtune.version import __version__

    activations = config.model.quantization_activations
    source_length, target_length = config.data.max_source_length, config.data.max_target_length
    assert source_length is not None
    assert target_length is not None
    rounding = {"quantization_activations": activations} if activations else {}
    if embeddings := rounded_embeddings(model):  # runs from before there was a choice do not name it
        rounding["quantization_embeddings"] = embeddings
    return RunIdentity(
        model=config.model.source,
        model_fingerprint=model.fingerprint(),
        template=template_for(model.family).name,
        dtype=str(model.dtype).removeprefix("torch."),
        data=asked.loaded.path,
        split=config.split,
        data_fingerprint=asked.loaded.fingerprint,
        num_rows=len(asked.questions),
        max_source_length=source_length,
        max_target_length=target_length,
        source_prefix=config.data.source_prefix,
        generation=deciding_settings(config.generation) | rounding,
        glmtune_version=__version__,
        **tuning.identity,
    )


def _announce(
    console: Console,
    config: PredictConfig,
    asked: _Asked,
    tuning: _Tuning,
    folder: Path,
) -> None:
    rows = asked.unseen.line(answers="the reference's end")
    lines = (
        f"model  {config.model.described}, {tuning.name}",
        f"data   {asked.loaded.path}: {rows}",
        *([f"length {asked.chosen_lengths}"] if asked.chosen_lengths else []),
        f"output {folder}",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _report(console: Console, tuned: PredictedSplit, base: PredictedSplit | None) -> tuple[Difference, ...]:
    """Print tables and samples; return the paired comparison if there is one."""
    from glmtune.inference.predict import report
    from glmtune.metrics.significance import paired_bootstrap
    from glmtune.metrics.tables import comparison_table, report_table

    differences: tuple[Difference, ...] = ()
    if tuned.report is None:
        console.print("Some rows have no reference answer, so nothing is scored.")
    else:
        console.print(report_table(tuned.report, "scores"))
    if base is not None and tuned.scores and base.scores:
        differences = paired_bootstrap(base.scores, tuned.scores)
        table = comparison_table(differences, a="before", b="after", num_rows=len(tuned.scores))
        console.print(table)
        report.write_comparison(
            tuned.folder,
            differences,
            a=str(base.folder),
            b=str(tuned.folder),
            num_rows=len(tuned.scores),
            test="paired bootstrap; a the untuned base, b the tuned model",
        )
        main = next(item for item in differences if item.metric == "bleu-4")
        console.print(main.verdict("before", "after"), highlight=False, soft_wrap=True)
    console.print(
        report.samples_table(tuned.predictions)
        if base is None
        else report.before_and_after(base.predictions, tuned.predictions)
    )
    for line in (report.switch_line(tuned.predictions), tuned.looked_up.line, f"Written: {tuned.folder}"):
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return differences


def _next_command(config: PredictConfig) -> str:
    """Word what one types next: export what was tuned; tune on these rows what was not."""
    from glmtune.command_line import command_words, data_words, model_words

    values = as_written(dataclasses.asdict(config))
    model = model_words(values["model"])
    if config.adapter_path is None and config.prefix_path is None:
        data = data_words(values["data"])
        if config.data.train_file is None:
            data = {"data": "files", "data.train_file": "FILE"}
        elif "data.train_file" in data or "data.test_file" in data:
            data = {**data, "data.train_file": values["data"]["train_file"], "split": None}
        return command_words("train", {"+recipe": "ptuning", **model, **data})
    tuned = {name: values[name] for name in ("prefix_path", "adapter_path")}
    form = {} if config.prefix_path is None else {"format": "official"}
    if config.prefix_strength != 1:  # for which the official file has no place
        form = {"prefix_strength": f"{config.prefix_strength:g}", "format": "tuned"}
    if config.adapter_scale != 1:
        form = {"adapter_scale": f"{config.adapter_scale:g}"}
    base = {name: value for name, value in model.items() if not name.startswith("quantization")}
    return command_words("export", {**tuned, **base, **form})


COMMAND = Command(
    name="predict",
    summary="generate answers for a data set and score them",
    schema=PredictConfig,
    run=run,
    takes_words=True,
    examples=(
        "glmtune predict data=ads prefix_path=runs/ads compare_base=true",
        "glmtune predict adapter_path=runs/lora compare_base=true",
        "glmtune predict data=adgen prefix_path=runs/adgen/checkpoint-3000 generation=official_sampling",
        "glmtune predict model=chatglm2-6b data.test_file=questions.jsonl output_dir=runs/answers",
    ),
)
