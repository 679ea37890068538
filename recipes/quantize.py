"""Write a quantized copy of a model, with a report of every layer: `glmtune quantize`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError
from glmtune.models.checkpoints.quantized_layout import INT8_EMBEDDINGS
from glmtune.models.settings import CheckpointSettings
from glmtune.quantization.settings import QuantizationSettings, chosen_method
from glmtune.settings import check_range, setting
from glmtune.storage.names import last_part, portable_name
from recipes.words.compose import Command

if TYPE_CHECKING:
    from glmtune.models.tokenizers.base import GlmTokenizer
    from glmtune.quantization.files.write import QuantizeJob, QuantizeResult
    from glmtune.quantization.layers.report import QuantizationReport
    from glmtune.tables import TextTable
    from glmtune.terminal.console import Console

MEBIBYTE = 2**20


@dataclass(frozen=True)
class QuantizeConfig:
    """What to quantize, and how."""

    model: CheckpointSettings = setting(CheckpointSettings, "the unquantized model")
    bits: int | None = setting(None, "4 or 8: the official format of that width")
    quantization: QuantizationSettings = setting(QuantizationSettings, "the method and what is left out")
    data: DataSettings = setting(DataSettings, "training rows that calibrated methods (-gptq) look at")
    num_calibration_rows: int = setting(64, "how many of them")
    seed: int = setting(42, "seed of their choice")
    output_dir: str | None = setting(
        None, "folder to appear; default: runs/quantize-MODEL-METHOD, -e8 behind it for INT8 embeddings"
    )
    max_shard_mib: int = setting(2048, "largest weight file, MiB")
    overwrite: bool = setting(False, "replace an earlier result in output_dir; other folders never are")
    keep_chat_template: bool = setting(
        False, "copy on the chat template of the model (Jinja, which other tools run)"
    )

    def __post_init__(self) -> None:
        """Check what needs no file.

        Raises:
            ConfigError: a value is not allowed, or two contradict each other.
        """
        chosen_method(self.quantization.method, self.bits)
        check_range("max_shard_mib", self.max_shard_mib, low=1)
        check_range("num_calibration_rows", self.num_calibration_rows, low=1)
        if self.model.source is None:
            raise ConfigError(
                "`model.source` is null, but there must be a model to quantize. Add `model=NAME_OR_FOLDER`."
            )

    @property
    def method(self) -> str:
        """Name of the method."""
        return chosen_method(self.quantization.method, self.bits)


def run(config: QuantizeConfig) -> QuantizeResult:
    """Say what is to be done, quantize and write, print the report.

    Args:
        config: all settings.

    Returns:
        What was written.

    Raises:
        GlmtuneError: see ``glmtune.quantization.files.write.quantize_checkpoint``.
    """
    from glmtune.terminal.console import Console

    job = _job(config)
    result = _quantize(job)
    console = Console()
    console.print(_report_table(result.report))
    _print_summary(console, result)
    return result


def _job(config: QuantizeConfig) -> QuantizeJob:
    """Turn settings into a job, with calibration rows where the method needs them."""
    from glmtune.quantization.files.write import QuantizeJob

    source = str(config.model.source)
    embeddings = config.quantization.layout_embeddings
    name = config.method + ("-e8" if embeddings == INT8_EMBEDDINGS else "")
    default = Path("runs") / f"quantize-{portable_name(last_part(source))}-{name}"
    return QuantizeJob(
        source=source,
        method=config.method,
        output_dir=Path(config.output_dir) if config.output_dir else default,
        family=config.model.family,
        skip=tuple(config.quantization.skip),
        embeddings=embeddings,
        max_shard_bytes=config.max_shard_mib * MEBIBYTE,
        overwrite=config.overwrite,
        keep_chat_template=config.keep_chat_template,
        calibration_rows=_calibration_rows(config),
    )


def _calibration_rows(config: QuantizeConfig) -> tuple[tuple[int, ...], ...]:
    """Draw rows of the training split, encoded as for training; none where the method needs none."""
    import random

    from glmtune.data.dataset import load_split
    from glmtune.loading import load_tokenizer
    from glmtune.quantization.arithmetic.methods import method_named
    from glmtune.tiny.generated import resolve_generated

    if not method_named(config.method).calibrated:
        return ()
    tokenizer = load_tokenizer(str(config.model.source), family=config.model.family)
    data = dataclasses.replace(config.data, train_file=resolve_generated(config.data.train_file))
    split = load_split(data, "train", cast("GlmTokenizer", tokenizer), progress=True)
    count = len(split.lengths)
    # By an own generator: the same seed gives the same rows, which a resumed run compares.
    chosen = random.Random(config.seed).sample(range(count), min(count, config.num_calibration_rows))
    return tuple(tuple(split.rows[index]["input_ids"]) for index in chosen)


def _quantize(job: QuantizeJob) -> QuantizeResult:
    """Quantize and write; progress goes to stderr, stdout holds the report only."""
    from glmtune.quantization.arithmetic.methods import method_named
    from glmtune.quantization.files.write import quantize_checkpoint
    from glmtune.terminal.progress import Meter

    unit = "blocks" if method_named(job.method).calibrated else "weights"
    with Meter(f"quantizing to {job.method}", unit=unit) as meter:
        return quantize_checkpoint(job, lambda done, total: meter.update(done, total=total))


def _report_table(report: QuantizationReport) -> TextTable:
    """Lay out a report, one line per kind of layer."""
    from glmtune.tables import TextTable

    rows: list[tuple[str, ...]] = []
    # A kind has one reason: layers are skipped by kind or by name, and one example tells which.
    reasons = {layer.kind: layer.reason for layer in report.layers if not layer.replaced}
    worst = {layer.name: layer.sqnr_db for layer in report.layers}
    for kind in report.kinds():
        lowest = worst.get(kind.worst)
        layer = kind.worst.partition(".layers.")[2].partition(".")[0]
        notes = [f"lowest {lowest:.2f}" + (f", layer {layer}" if layer else "")] if lowest is not None else []
        notes += [reasons[kind.kind]] if kind.num_skipped else []
        counts = (str(kind.num_replaced), str(kind.num_skipped), f"{kind.bits_per_weight:.2f}")
        loss = "-" if kind.sqnr_db is None else f"{kind.sqnr_db:.2f}"
        rows.append((kind.kind, *counts, loss, "; ".join(notes)))
    title = f"quantized by {report.method}; bits per weight with scales, SQNR of {report.measured}"
    columns = ("layer", "replaced", "skipped", "bits", "SQNR dB", "notes")
    return TextTable(title, columns, tuple(rows), text_columns=("notes",))


def _print_summary(console: Console, written: QuantizeResult) -> None:
    from glmtune.command_line import command_words, model_words

    smaller = written.source_bytes / max(1, written.num_bytes)
    form = "official format" if written.is_official else "glmtune's own format"
    for line in (
        f"size    {written.num_bytes / MEBIBYTE:,.1f} MiB, {smaller:.2f} times smaller; "
        f"{written.report.bits_per_weight:.2f} bits per weight with scales and all unquantized layers",
        f"format  {form}",
        *(
            [f"resumed {written.num_reused} layers were quantized by an earlier run"]
            * (written.num_reused > 0)
        ),
        f"Written: {written.folder}",
        f"next: {command_words('eval', {**model_words({'source': written.folder}), 'benchmark': 'ceval'})}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


COMMAND = Command(
    name="quantize",
    summary="Write a quantized copy of a model, with a report of every layer.",
    schema=QuantizeConfig,
    run=run,
    examples=(
        "glmtune quantize model=glm-tiny bits=4",
        "glmtune quantize model=chatglm2-6b quantization=int4-g64 output_dir=chatglm2-6b-int4-g64",
        "glmtune quantize quantization=int4-gptq data=ads",
        "glmtune quantize model=chatglm2-6b quantization=int4-g64 quantization.embeddings=int8",
        "glmtune quantize model=chatglm-6b bits=4 quantization.embeddings=true",
    ),
)
