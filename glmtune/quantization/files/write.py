"""A quantized copy of a checkpoint: quantized as it is read, written aside, read back, then put in place.

Read back, because a bad disk or a bug in the order of fused rows gives a model that
loads and answers, only worse.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from glmtune.errors import CheckpointError, ConfigError, GlmtuneError
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.checkpoints.names import FusedLayout, official_tensor, written_table
from glmtune.models.checkpoints.quantized_layout import INT8_EMBEDDINGS, QuantizedLayout
from glmtune.models.checkpoints.shards import OpenShards, read_records, weight_files
from glmtune.models.checkpoints.transformers_format import is_transformers_format
from glmtune.models.checkpoints.writing import DEFAULT_SHARD_BYTES, save_official
from glmtune.models.load import GlmModel, load_config, load_official
from glmtune.models.releases.source import resolve_source
from glmtune.models.tokenizers.load import VOCABULARIES, load_tokenizer_folder
from glmtune.quantization.arithmetic.methods import method_named
from glmtune.quantization.files.quantize_on_load import QuantizingReader
from glmtune.quantization.layers.calibrate import quantize_calibrated
from glmtune.quantization.layers.finished_layers import FinishedLayers, weight_files_identity
from glmtune.quantization.layers.report import QuantizationReport
from glmtune.storage.files import (
    check_output,
    folder_error,
    prepared_folder,
    put_back,
    real_place,
    write_json,
)
from glmtune.storage.lock import lock_beside
from glmtune.storage.manifest import write_manifest
from glmtune.version import __version__

REPORT_FILE = "quantization_report.json"
"""Written last into every quantized folder; only folders that hold it are ever replaced."""


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """What to quantize.

    Attributes:
        source: preset name, hub id or folder of an unquantized checkpoint.
        method: a name in ``METHODS``.
        output_dir: folder to appear.
        family: release line, None to detect it.
        skip: see `plan_layout`.
        embeddings: see `plan_layout`.
        max_shard_bytes: largest weight file.
        overwrite: replace an earlier result in ``output_dir``.
        calibration_rows: token ids for calibrated methods; others do not look at them.
        keep_chat_template: see `load_tokenizer_folder`.
    """

    source: str
    method: str
    output_dir: Path
    family: str | None = None
    skip: tuple[str, ...] = ()
    embeddings: bool | str = False
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    overwrite: bool = False
    calibration_rows: tuple[tuple[int, ...], ...] = ()
    keep_chat_template: bool = False


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What was written.

    Attributes:
        folder: where it lies.
        report: what was done to every layer.
        is_official: the released code reads it, too.
        num_bytes: of the weight files.
        source_bytes: of the source's weights.
        num_reused: layers that an earlier run, which was stopped, had quantized already.
    """

    folder: Path
    report: QuantizationReport
    is_official: bool
    num_bytes: int
    source_bytes: int
    num_reused: int = 0


def quantize_checkpoint(
    job: QuantizeJob, on_progress: Callable[[int, int], None] | None = None
) -> QuantizeResult:
    """Write a quantized copy of a checkpoint, with its tokenizer and a report of every layer.

    Memory: the quantized model, and a shard while it is written; calibrated methods need the whole model
    first. Every layer is kept aside as soon as it is done, so a run that was killed leaves nothing under
    ``output_dir``, and the same command goes on with the next layer (calibrated methods: block).

    Args:
        job: what to do.
        on_progress: called with the number of weights (calibrated methods: blocks) done and of all.

    Raises:
        ConfigError: the source is quantized already; ``output_dir`` is taken, or being written by another
            process; see `plan_layout`.
        CheckpointError: the source is damaged, or the files written do not hold what they should.
    """
    final = real_place(job.output_dir)
    with lock_beside(final):
        return _quantize_into(final, job, on_progress)


def _quantize_into(
    final: Path, job: QuantizeJob, on_progress: Callable[[int, int], None] | None
) -> QuantizeResult:
    # Whatever can be refused is refused before the first weight is read: quantizing takes minutes to hours.
    put_back(final)
    parts = final.with_name(f".{final.name}.parts")
    _drop_used(parts, final / REPORT_FILE)
    check_output(final, overwrite=job.overwrite, marker=REPORT_FILE, result="quantized model")
    folder = resolve_source(job.source)
    config = load_config(job.source, folder, job.family)
    layout = QuantizedLayout.of(config)
    if layout is not None:
        raise ConfigError(
            f"`model.source` is `{job.source}`, which is quantized already ({layout.name}). Name the "
            "unquantized release: what was rounded once does not come back."
        )
    if final.exists() and folder.resolve().is_relative_to(final.resolve()):
        raise ConfigError(
            f"`output_dir` is `{final}`, which holds the source `{folder}`. Give another folder."
        )
    try:
        finished = FinishedLayers(parts, _identity(job, folder))
        return _write(
            final, job, folder, finished, lambda: _quantized_model(job, config.dtype, on_progress, finished)
        )
    except OSError as error:
        raise folder_error(final, error) from error


def _drop_used(parts: Path, report: Path) -> None:
    """Remove finished layers whose result is in place: a kill may come between the two.

    The report is the last file of a result. Older layers went into it; younger ones are those of a run that
    is to replace it, and the same command goes on with them.
    """
    times = [path.stat().st_mtime_ns for path in parts.glob("*")]
    if times and report.is_file() and max(times) <= report.stat().st_mtime_ns:
        shutil.rmtree(parts, ignore_errors=True)


def _write(
    final: Path,
    job: QuantizeJob,
    source: Path,
    finished: FinishedLayers,
    make: Callable[[], tuple[GlmModel, QuantizationReport]],
) -> QuantizeResult:
    """Write the model aside, check it, put it in place.

    Finished layers go when the result is in place, and after an error of ours: the same source would fail
    again. They stay after a full disk (OSError) or a kill, when the same command can go on with them.
    """
    try:
        model, report = make()
        with prepared_folder(final) as folder:
            save_official(model, folder, max_shard_bytes=job.max_shard_bytes)
            _check_written(model, folder)
            _copy_surroundings(source, folder, model, keep_chat_template=job.keep_chat_template)
            written = QuantizedLayout.of(model.config)
            assert written is not None
            sizes = (_weight_bytes(folder), _weight_bytes(source))
            is_official = written.is_official and not is_transformers_format(model.config)
            result = QuantizeResult(final, report, is_official, *sizes, finished.num_reused)
            described = {"source": job.source, "is_official": result.is_official, **report.as_dict()}
            described |= {"num_bytes": result.num_bytes, "source_bytes": result.source_bytes}
            write_manifest(folder, {})  # loading compares: safetensors carry no checksums of their own
            write_json(folder / REPORT_FILE, described)  # last: it says that the folder is complete
    except GlmtuneError:
        finished.discard()
        raise
    finished.discard()
    return result


def _quantized_model(
    job: QuantizeJob,
    dtype: str | torch.dtype | None,
    on_progress: Callable[[int, int], None] | None,
    finished: FinishedLayers,
) -> tuple[GlmModel, QuantizationReport]:
    """Load in the stored floating type, as codes; a calibrated method needs the whole model first.

    The stored type (``dtype``), because layers that stay as they are must be written with the bytes they had.
    """
    if not method_named(job.method).calibrated:
        options: dict[str, Any] = {"skip": job.skip, "embeddings": job.embeddings, "measure": True}
        reader = QuantizingReader(job.method, on_progress=on_progress, finished=finished, **options)
        model = load_official(job.source, dtype=dtype, device="cpu", family=job.family, quantizer=reader)
        return model, reader.report
    if job.embeddings is True:
        raise ConfigError(
            f"`embeddings` is true, but `{job.method}` calibrates linear layers of blocks only. Use "
            f"`{INT8_EMBEDDINGS}`, which looks at no rows, or leave it out."
        )
    model = load_official(job.source, dtype=dtype, device="cpu", family=job.family)
    return model, quantize_calibrated(
        model,
        job.method,
        job.calibration_rows,
        skip=job.skip,
        embeddings=job.embeddings,
        on_progress=on_progress,
        finished=finished,
    )


def _identity(job: QuantizeJob, source: Path) -> dict[str, Any]:
    """Return everything that decides how layers are quantized; our version, as arithmetic may change."""
    rows = hashlib.sha256(json.dumps(job.calibration_rows).encode()).hexdigest()
    files = weight_files_identity([source / "config.json", *weight_files(source)])
    return {"files": files, "method": job.method, "skip": list(job.skip), "embeddings": job.embeddings,
            "family": job.family, "calibration_rows": rows, "glmtune_version": __version__}  # fmt: skip


def _check_written(model: PreTrainedModel, folder: Path) -> None:
    """Compare every tensor in the files with the one in memory, bit by bit."""
    config: Any = model.config
    records, state, layout = read_records(folder), model.state_dict(), FusedLayout.of(config)
    with OpenShards() as shards:
        for entry in written_table(config):
            expected = official_tensor(entry, state, layout)
            if not torch.equal(shards.read(records[entry.official]), expected):
                raise CheckpointError(
                    f"{folder}: {entry.official} reads back otherwise than it was written. Check the disk, "
                    "and quantize again."
                )


def _copy_surroundings(source: Path, folder: Path, model: Any, *, keep_chat_template: bool) -> None:
    """Write tokenizer and generation settings beside the weights."""
    if any((source / name).is_file() for name in VOCABULARIES):
        tokenizer = load_tokenizer_folder(source, model.family, keep_chat_template=keep_chat_template)
        tokenizer.save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))
    name = read_config(source).get("_name_or_path")
    if name:  # the released code and other tools recognise a release by it
        file = folder / "config.json"
        content = json.loads(file.read_text(encoding="utf-8")) | {"_name_or_path": name}
        write_json(file, content)


def _weight_bytes(folder: Path) -> int:
    return sum(record.num_bytes for record in read_records(folder).values())
