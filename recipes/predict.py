"""Generate answers for a data set and score them: `glmtune predict`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtune.data.settings import SPLITS, DataSettings
from glmtune.errors import ConfigError
from glmtune.inference.settings import GenerationSettings
from glmtune.models.settings import ModelSettings
from glmtune.settings import check_choice, setting
from recipes.compose import Command

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from glmtune.data.dataset import ConversationSet
    from glmtune.inference.predict.predict import PredictedSplit
    from glmtune.inference.predict.run_identity import RunIdentity
    from glmtune.journal import Journal
    from glmtune.metrics.significance import Difference
    from glmtune.models.load import GlmModel


@dataclass(frozen=True)
class PredictConfig:
    """What to answer, with which model, and where the answers go."""

    model: ModelSettings = setting(ModelSettings, "the base model")
    data: DataSettings = setting(DataSettings, "the questions and reference answers")
    generation: GenerationSettings = setting(GenerationSettings, "how answers are generated")
    prefix_path: str | None = setting(
        None,
        "tuned prefix: a run folder, one of its checkpoints, or a file (also the official pytorch_model.bin)",
    )
    adapter_path: str | None = setting(None, "LoRA adapter: a run folder or one of its checkpoints")
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
        if self.pre_seq_len and self.prefix_path is None:
            raise ConfigError(
                f"`pre_seq_len` is {self.pre_seq_len}, but no prefix is given. Add `prefix_path=RUN`, or"
                " leave `pre_seq_len` out."
            )
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


def run(config: PredictConfig) -> PredictResult:
    """Load, generate, score, and print what came out.

    Args:
        config: all settings.

    Returns:
        The answers and scores; the folder holds ``generated_predictions.jsonl`` and ``predict_results.json``.

    Raises:
        GlmtuneError: a setting, the data, the checkpoint, the prefix or the adapter cannot be used.
    """
    from rich.console import Console

    from glmtune.data.dataset import load_conversations
    from glmtune.inference.predict.predict import predict_split
    from glmtune.inference.predict.questions import build_questions
    from glmtune.inference.predict.run_identity import open_journal
    from glmtune.loading import load_base, load_tokenizer
    from glmtune.quantization.kernels.dispatch import prepare_for_inference

    console = Console()
    tuned_path = _find_tuned(config)
    folder = (
        Path(config.output_dir).expanduser() if config.output_dir else _default_folder(config, tuned_path)
    )
    loaded = load_conversations(config.data, config.split, need_answers=False)
    tokenizer = load_tokenizer(config.model.source, family=config.model.family)
    questions = build_questions(tokenizer, loaded, config.data)
    # Held to the end, and before a second model would be put beside that of another process.
    with open_journal(folder) as journal:
        source = config.model
        model = load_base(
            source.source,
            dtype=source.dtype,
            device=source.device,
            family=source.family,
            quantization=source.method,
        )
        tuning = _tune(config, model, tuned_path)
        prepare_for_inference(model, activations=source.quantization_activations)
        _announce(console, config, loaded, tuning, folder)

        def predict(into: Journal, tuning: _Tuning) -> PredictedSplit:
            identity = _identity(config, model, loaded, len(questions), tuning)
            return predict_split(
                model,
                tokenizer,
                questions,
                config.generation,
                journal=into,
                identity=identity,
                resume=config.resume,
                console=console,
            )

        base = None
        if config.compare_base:
            with open_journal(folder / "base") as base_journal, tuning.base_alone:
                base = predict(base_journal, _Tuning())
        tuned = predict(journal, tuning)
        differences = _report(console, tuned, base)
    return PredictResult(tuned=tuned, base=base, differences=differences)


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
        adapted = load_adapter(path, model)
        identity = {"adapter": str(path), "adapter_sha256": adapter_sha256(path)}
        return _Tuning(f"adapter {path}", identity, adapted.disable_adapter())
    prefix = load_prefix(path, model)
    length = prefix.pre_seq_len
    if config.pre_seq_len not in (None, length):
        raise ConfigError(
            f"`pre_seq_len` is {config.pre_seq_len}, but the prefix {path} has length {length}. Leave"
            " `pre_seq_len` out (the file tells), or give another prefix."
        )
    attach_prefix(model, prefix)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    identity = {"prefix": str(path), "prefix_sha256": digest, "pre_seq_len": length}
    return _Tuning(f"prefix {path} ({length} tokens)", identity, without_prefix(model))


def _default_folder(config: PredictConfig, tuned: Path | None) -> Path:
    """Return `predict` in the run folder of what was tuned, or a folder under `runs` for a base model."""
    if tuned is None:
        return Path("runs") / f"predict-base-{Path(config.model.source).name}"
    folder = tuned if tuned.is_dir() else tuned.parent
    if folder.name == "last":
        return folder.parent / "predict"
    if folder.name == "best" or folder.name.startswith("checkpoint-"):
        return folder.parent / f"predict-{folder.name}"
    return folder / "predict"


def _identity(
    config: PredictConfig,
    model: GlmModel,
    loaded: ConversationSet,
    num_rows: int,
    tuning: _Tuning,
) -> RunIdentity:
    from glmtune.inference.predict.run_identity import RunIdentity, deciding_settings
    from glmtune.models.templates.renderer import template_for
    from glmtune.version import __version__

    activations = config.model.quantization_activations
    rounding = {"quantization_activations": activations} if activations else {}
    return RunIdentity(
        model=config.model.source,
        model_fingerprint=model.fingerprint(),
        template=template_for(model.family).name,
        dtype=str(model.dtype).removeprefix("torch."),
        data=loaded.path,
        split=config.split,
        data_fingerprint=loaded.fingerprint,
        num_rows=num_rows,
        max_source_length=config.data.max_source_length,
        max_target_length=config.data.max_target_length,
        source_prefix=config.data.source_prefix,
        generation=deciding_settings(config.generation) | rounding,
        glmtune_version=__version__,
        **tuning.identity,
    )


def _announce(
    console: Console,
    config: PredictConfig,
    loaded: ConversationSet,
    tuning: _Tuning,
    folder: Path,
) -> None:
    lines = (
        f"model  {config.model.described}, {tuning.name}",
        f"data   {loaded.path}: {len(loaded.conversations)} rows",
        f"output {folder}",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _report(console: Console, tuned: PredictedSplit, base: PredictedSplit | None) -> tuple[Difference, ...]:
    """Print tables and samples; return the paired comparison if there is one."""
    from glmtune.inference.predict.report import samples_table, write_comparison
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
        write_comparison(
            tuned.folder,
            differences,
            a=str(base.folder),
            b=str(tuned.folder),
            num_rows=len(tuned.scores),
            test="paired bootstrap; a the untuned base, b the tuned model",
        )
        main = next(item for item in differences if item.metric == "bleu-4")
        console.print(main.verdict("before", "after"), highlight=False, soft_wrap=True)
    console.print(samples_table(tuned.predictions, None if base is None else base.predictions))
    console.print(f"Written: {tuned.folder}", markup=False, highlight=False, soft_wrap=True)
    return differences


COMMAND = Command(
    name="predict",
    summary="generate answers for a data set and score them",
    schema=PredictConfig,
    run=run,
    examples=(
        "glmtune predict data=ads prefix_path=runs/ads compare_base=true",
        "glmtune predict adapter_path=runs/lora compare_base=true",
        "glmtune predict data=adgen prefix_path=runs/adgen/checkpoint-3000 generation=official_sampling",
        "glmtune predict model=chatglm2-6b data.test_file=questions.jsonl output_dir=runs/answers",
    ),
)
