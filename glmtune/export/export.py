"""Export a base with its prefix or adapter: write aside, reload, compare logits, then put it in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from glmtune.adapter import load_adapter
from glmtune.errors import CheckpointError, ConfigError
from glmtune.export.gguf.folder import Written, model_name, read_back, write_gguf
from glmtune.export.gguf.types import FILE_TYPES
from glmtune.export.official_vocabulary import official_tokenizer
from glmtune.export.peft_adapter import read_by_peft, write_peft_adapter
from glmtune.export.source import ExportJob, OnProgress, Source, placeholders
from glmtune.export.streamed import probe_ids, probe_logits, stream_weights
from glmtune.export.tensors import (
    LazyTensors,
    native_tensors,
    stored_tensors,
    without_head,
)
from glmtune.export.tokenizer import write_tokenizer
from glmtune.export.tuned import write_tuned_adapter, write_tuned_prefix
from glmtune.models.checkpoints.config import official_config
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.checkpoints.shard_writer import write_shards
from glmtune.models.checkpoints.shards import OpenShards
from glmtune.models.checkpoints.transformers_format import (
    official_form,
    transformers_values,
    unofficial,
)
from glmtune.models.checkpoints.writing import official_tensors
from glmtune.models.generation import release_generation
from glmtune.models.load import build_model, load_config
from glmtune.models.tokenizers.load import VOCABULARIES, load_tokenizer_folder
from glmtune.models.tokenizers.tokenizer_json import JsonTokenizer
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import export_official_prefix, load_prefix
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
from glmtune.switch.model import switch_of
from glmtune.version import __version__

if TYPE_CHECKING:
    from peft import PeftModel

MARKER = "glmtune_export.json"
"""Written last into every export; only folders that hold it are ever replaced, see `check_output`."""
PREFIX_FOLDER = "prefix_encoder"
EXACT = 1e-5
"""Largest difference of logits, as a fraction of the largest logit, where the export keeps every number: what
the order of summation changes in float32, as transformers' own classes need not compute in the order of
ours."""
ROUNDED = 16
"""The same where numbers are rounded (to the written type, by merging an adapter, or because they were
codes), in units of the written type's spacing (eps). Roundings of some thousand terms per logit mostly
cancel; a wrong row order, a missing layer or another scale is off by the size of the logits themselves."""
STAGES = ("writing", "running the source", "running the export")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how near it is to its source.

    Attributes:
        folder: where it lies.
        dtype: floating type of the weights; with ``gguf`` the type of the file.
        num_bytes: of all weights (with ``prefix``, ``tuned`` and ``peft``: of what was tuned).
        max_difference: largest difference of a logit between source and export, computed in float32.
        max_logit: largest logit of the source.
        limit: difference allowed.
        left_out: what was tuned has, and the format cannot hold; "" for nothing.
    """

    folder: Path
    dtype: str
    num_bytes: int
    max_difference: float
    max_logit: float
    limit: float
    left_out: str = ""


def export(job: ExportJob, on_progress: OnProgress = lambda stage, done, total: None) -> Exported:
    """Write an export, prove it against its source, and put it in place.

    Weights pass through memory one shard at a time (2 GiB by default, where a 9B model takes 19). The logits
    are computed from the source and from the files written, module by module: a module's weights are read for
    its forward pass and dropped after it, so memory is that of the largest one. In float32, because in 16
    bits two right computations already differ by more than many mistakes would.

    Args:
        job: what to export.
        on_progress: told how far it is.

    Returns:
        What was written, with the figures of the comparison.

    Raises:
        ConfigError: the format cannot hold what was asked for; ``output_dir`` is taken, or being written by
            another process.
        CheckpointError: the source is damaged, or the export does not answer as its source does.
    """
    final = real_place(job.output_dir)
    with lock_beside(final):
        return _export_into(final, job, on_progress)


def _export_into(final: Path, job: ExportJob, on_progress: OnProgress) -> Exported:
    put_back(final)
    check_output(final, overwrite=job.overwrite, marker=MARKER, result="export")
    with OpenShards() as shards:
        return _export_from(Source(job, shards, on_progress), final, job)


def _export_from(source: Source, final: Path, job: ExportJob) -> Exported:
    if final.exists() and source.folder.resolve().is_relative_to(final.resolve()):
        # `overwrite=true` on the export that is the source: it would be deleted at the end.
        raise ConfigError(
            f"`output_dir` is `{final}`, which holds the source `{source.folder}`. Give another folder."
        )
    try:
        with prepared_folder(final) as aside:
            num_bytes = WRITERS[job.format](source, aside, job)
            figures = _compare(source, aside, job)
            kind = job.gguf_type if source.gguf else str(source.dtype).removeprefix("torch.")
            exported = Exported(final, kind, num_bytes, *figures, _left_out(source, job))
            if job.format in ("official", "transformers"):  # glmtune itself loads them, and compares then
                write_manifest(aside, {})
            write_json(aside / MARKER, _record(job, exported))  # only now is it an export
    except OSError as error:
        raise folder_error(final, error) from error
    return exported


def _left_out(source: Source, job: ExportJob) -> str:
    """Say what of a switch: no format of others holds one, and merged weights cannot be switched off."""
    if switch_of(source.runnable) is None or job.format == "tuned":
        return ""
    what = "prefix" if source.prefix is not None else "adapter"
    return (
        f"The {what} has a switch, which this format cannot hold: in the export it applies to every request. "
        f"To keep the switch, take `format=tuned`, or load base and {what} side by side in glmtune."
    )


def _write_transformers(source: Source, folder: Path, job: ExportJob) -> int:
    write_json(folder / "config.json", transformers_values(source.config, source.dtype) | _name_of(source))
    release_generation(source.folder, source.config).save_pretrained(str(folder))
    _write_fast_tokenizer(source, folder)
    weights = without_head(source.weights) if source.config.tie_word_embeddings else source.weights
    return _write_weights(source, weights, folder, job)


def _write_fast_tokenizer(source: Source, folder: Path) -> None:
    """Write tokenizer.json, and the vocabulary file of an official release beside it; see `JsonTokenizer`."""
    if not any((source.folder / name).is_file() for name in VOCABULARIES):
        return
    tokenizer = load_tokenizer_folder(source.folder, source.family)
    write_tokenizer(tokenizer, folder)
    if not isinstance(tokenizer, JsonTokenizer):  # which writes it by itself, where its folder has one
        tokenizer.save_vocabulary(str(folder))


def _write_official(source: Source, folder: Path, job: ExportJob) -> int:
    config = official_form(source.config)
    num_bytes = _write_weights(source, official_tensors(source.weights, config), folder, job)
    values = official_config(config, source.family)
    values |= {"torch_dtype": str(source.dtype).removeprefix("torch.")} | _name_of(source)
    write_json(folder / "config.json", values)
    release_generation(source.folder, source.config).save_pretrained(str(folder))
    if any((source.folder / name).is_file() for name in VOCABULARIES):
        # Written anew, not copied: the file of settings may name code, and hold templates, of anybody.
        tokenizer = load_tokenizer_folder(
            source.folder, source.family, keep_chat_template=job.keep_chat_template
        )
        if isinstance(tokenizer, JsonTokenizer):
            tokenizer = official_tokenizer(tokenizer, source.family, folder)
        tokenizer.save_pretrained(str(folder))
    if source.prefix is not None:
        _write_prefix(source, folder / PREFIX_FOLDER, job)
    return num_bytes


def _name_of(source: Source) -> dict[str, str]:
    """Return the name under which the source was released, as far as its config.json tells."""
    name = read_config(source.folder).get("_name_or_path")
    return {"_name_or_path": name} if isinstance(name, str) and name else {}


def _write_weights(source: Source, tensors: LazyTensors, folder: Path, job: ExportJob) -> int:
    written = write_shards(
        folder,
        tensors,
        dtypes=dict.fromkeys(tensors, source.dtype),
        max_shard_bytes=job.max_shard_bytes,
        on_shard=partial(source.on_progress, STAGES[0]),
    )
    return written.num_bytes


def _write_prefix(source: Source, folder: Path, _: ExportJob) -> int:
    assert source.prefix is not None
    config = source.config
    if unofficial(config):  # no release has this base; what it is, is said all the same
        values = transformers_values(config, source.dtype)
    else:
        values = official_config(official_form(config), source.family)
    return export_official_prefix(source.prefix, folder, config=values).stat().st_size


def _write_tuned(source: Source, folder: Path, job: ExportJob) -> int:
    if source.prefix is not None:
        return write_tuned_prefix(source.prefix, source.prefix_file, folder)
    return write_tuned_adapter(source.adapter, folder, job.adapter_scale)


def _write_peft(source: Source, folder: Path, _: ExportJob) -> int:
    return write_peft_adapter(cast("PeftModel", source.runnable), source.adapter, folder)


def _write_gguf(source: Source, folder: Path, job: ExportJob) -> int:
    source.gguf = Written(
        model_name(job.source), source.folder, source.config, source.family, source.weights, job.gguf_type
    )
    return write_gguf(folder, source.gguf, partial(source.on_progress, STAGES[0]))


WRITERS: dict[str, Callable[[Source, Path, ExportJob], int]] = {
    "transformers": _write_transformers,
    "official": _write_official,
    "prefix": _write_prefix,
    "tuned": _write_tuned,
    "peft": _write_peft,
    "gguf": _write_gguf,
}


def _compare(source: Source, folder: Path, job: ExportJob) -> tuple[float, float, float]:
    """Run the same ids through source and export; return difference, largest logit and limit."""
    ids = probe_ids(source.config)
    expected = probe_logits(source.runnable, ids, partial(source.on_progress, STAGES[1]))
    with OpenShards() as written:  # closed before the folder gets its name, which Windows would refuse
        reloaded = RELOADERS[job.format](source, folder, written)
        found = probe_logits(reloaded, ids, partial(source.on_progress, STAGES[2]))
    largest = float(expected.abs().max())
    # Exact is asked for only where the written type holds every stored number and nothing was computed.
    keeps_all = torch.promote_types(source.dtype, source.stored_dtype) == source.dtype
    is_exact = keeps_all and job.adapter_path is None and not source.is_quantized and source.gguf is None
    spacing = FILE_TYPES[job.gguf_type].spacing if source.gguf else torch.finfo(source.dtype).eps
    limit = largest * (EXACT if is_exact else max(EXACT, ROUNDED * spacing))
    difference = _max_difference(expected, found)
    if not difference <= limit:  # so that NaN fails
        raise CheckpointError(
            f"The export does not answer as its source: logits differ by up to {difference:.3g}, but at most "
            f"{limit:.3g} is allowed for {job.gguf_type if source.gguf else source.dtype} (largest logit "
            f"{largest:.3g}). Nothing was put into `{job.output_dir}`. Use "
            f"`{'gguf_type=F32' if source.gguf else 'dtype=float32'}`, and report this if it stays."
        )
    return difference, largest, limit


def _max_difference(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).abs().max()) if expected.shape == found.shape else float("nan")


def _reload_transformers(source: Source, folder: Path, shards: OpenShards) -> PreTrainedModel:
    # Through transformers' own names and classes, as every other tool will read it: our code has no part in
    # it.
    config = AutoConfig.from_pretrained(str(folder))
    model = placeholders(lambda: AutoModelForCausalLM.from_config(config))
    return _filled(model, stored_tensors(folder, shards, tied=config.tie_word_embeddings), folder)


def _reload_official(source: Source, folder: Path, shards: OpenShards) -> PreTrainedModel:
    config = load_config(folder, folder)
    model = placeholders(lambda: build_model(config))
    if source.prefix is not None:
        attach_prefix(model, load_prefix(folder / PREFIX_FOLDER, model))
    return _filled(model, native_tensors(folder, config, shards), folder)


def _reload_prefix(source: Source, folder: Path, _: OpenShards) -> PreTrainedModel:
    model = placeholders(lambda: build_model(copy.deepcopy(source.config)))
    attach_prefix(model, load_prefix(folder, model))
    return _filled(model, source.base, folder)


def _reload_tuned(source: Source, folder: Path, _: OpenShards) -> PreTrainedModel:
    # The base is that of the source, which was compared with what was tuned when it was read.
    model = placeholders(lambda: build_model(copy.deepcopy(source.config)))
    if source.prefix is not None:
        attach_prefix(model, load_prefix(folder, model, check_base=False))
        return _filled(model, source.base, folder)
    adapted = load_adapter(folder, model, check_base=False)
    stream_weights(adapted, source.base)
    return adapted  # pyright: ignore[reportReturnType]


def _reload_peft(source: Source, folder: Path, _: OpenShards) -> PreTrainedModel:
    adapted = read_by_peft(folder, transformers_values(source.config, torch.float32), build=placeholders)
    stream_weights(adapted, source.base)
    return adapted


def _reload_gguf(source: Source, folder: Path, _: OpenShards) -> PreTrainedModel:
    assert source.gguf is not None
    found, native = read_back(folder, source.gguf)
    # The model that the file describes, not the one it was made of.
    return _filled(placeholders(lambda: AutoModelForCausalLM.from_config(found.config())), native, folder)


RELOADERS: dict[str, Callable[[Source, Path, OpenShards], PreTrainedModel]] = {
    "transformers": _reload_transformers,
    "official": _reload_official,
    "prefix": _reload_prefix,
    "tuned": _reload_tuned,
    "peft": _reload_peft,
    "gguf": _reload_gguf,
}


def _filled(model: PreTrainedModel, weights: LazyTensors, folder: Path) -> PreTrainedModel:
    names = {
        name for name, _ in model.named_parameters(remove_duplicate=False) if "prefix_encoder" not in name
    }
    if names != set(weights):
        raise CheckpointError(f"{folder}: names differ from the model's: {sorted(names ^ set(weights))[:8]}.")
    stream_weights(model, weights)
    return model


def _record(job: ExportJob, exported: Exported) -> dict[str, Any]:
    names = ("source", "format", "prefix_path", "adapter_path", "prefix_strength", "adapter_scale")
    given = {name: getattr(job, name) for name in names}
    figures = {name: value for name, value in asdict(exported).items() if name != "folder"}
    return given | figures | {"glmtune_version": __version__}
