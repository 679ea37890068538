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

from glmtune.adapter import find_adapter, load_adapter
from glmtune.errors import CheckpointError, ConfigError
from glmtune.export.gguf.folder import Written, check_gguf, model_name, read_back, write_gguf
from glmtune.export.gguf.types import DEFAULT_TYPE, FILE_TYPES
from glmtune.export.official_vocabulary import official_tokenizer
from glmtune.export.peft_adapter import read_by_peft, write_peft_adapter
from glmtune.export.streamed import probe_ids, probe_logits, stream_weights
from glmtune.export.tensors import (
    LazyTensors,
    dequantized_tensors,
    is_adapted,
    merge_adapter,
    native_tensors,
    stored_dtype,
    stored_tensors,
    without_head,
)
from glmtune.export.tokenizer import write_tokenizer
from glmtune.export.tuned import write_tuned_adapter, write_tuned_prefix
from glmtune.models.checkpoints.config import official_config, read_config
from glmtune.models.checkpoints.fingerprint import weights_fingerprint
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout, without_layout
from glmtune.models.checkpoints.shard_writer import write_shards
from glmtune.models.checkpoints.transformers_format import (
    is_transformers_format,
    official_form,
    transformers_values,
    unofficial,
)
from glmtune.models.checkpoints.writing import official_tensors
from glmtune.models.generation import release_generation
from glmtune.models.load import build_model, load_config
from glmtune.models.placeholders import build_of_placeholders
from glmtune.models.releases.families import Family, family_of_config
from glmtune.models.releases.source import resolve_source
from glmtune.models.tokenizers.load import VOCABULARIES, load_tokenizer_folder
from glmtune.models.tokenizers.tokenizer_json import JsonTokenizer
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import check_official, export_official_prefix, find_prefix, load_prefix
from glmtune.settings import check_strengths
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
OnProgress = Callable[[str, int, int], object]
"""Told which of the ``STAGES`` it is at, how many steps of it are done, and of how many."""


@dataclass(frozen=True, slots=True)
class ExportJob:
    """What to export.

    Attributes:
        source: preset name, hub id or folder of the base.
        format: one of ``WRITERS``.
        output_dir: folder to appear.
        family: release line, None to detect it.
        prefix_path: a tuned prefix, as for `find_prefix`.
        adapter_path: a LoRA adapter, as for `find_adapter`; merged into the weights, or written alone.
        dtype: floating type of the weights; None keeps the stored one.
        max_shard_bytes: largest weight file.
        overwrite: replace an earlier export in ``output_dir``.
        keep_chat_template: see `load_tokenizer_folder`; with ``official`` only.
        prefix_strength: how much the prefix counts in the export; another than 1 with ``tuned`` only.
        adapter_scale: what the LoRA is multiplied by before it is written.
        gguf_type: with ``gguf``: type of the file, a key of ``FILE_TYPES``.
    """

    source: str
    format: str
    output_dir: Path
    family: str | None
    prefix_path: str | None
    adapter_path: str | None
    dtype: torch.dtype | None
    max_shard_bytes: int
    overwrite: bool
    keep_chat_template: bool = False
    prefix_strength: float = 1.0
    adapter_scale: float = 1.0
    gguf_type: str = DEFAULT_TYPE


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


class _Source:
    """The base as the user has it: weights read on demand, and a model of placeholders to run on them.

    Attributes:
        base: native name → weight of the base, codes turned into the weights they stand for.
        weights: the same with the adapter merged; what is written.
        model: the base alone, or with the prefix in it.
        runnable: what the export has to agree with: ``model``, or PEFT's wrapper around it. The adapter is
            not merged there, so that the comparison would notice a wrong merge.
    """

    def __init__(self, job: ExportJob, on_progress: OnProgress) -> None:
        self.on_progress = on_progress
        self.folder = resolve_source(job.source)
        self.config: Any = load_config(job.source, self.folder, job.family)
        self.family = family_of_config(self.config)
        _check_format(job, self.family)
        self.stored_dtype = stored_dtype(self.folder)
        self.dtype = job.dtype or self.stored_dtype
        self.base = native_tensors(self.folder, self.config)
        # Prefixes and adapters name the base they were trained on by this, so it is that of the files as they
        # are: its configuration is copied before `without_layout` turns ours into that of the weights.
        self.fingerprint = partial(weights_fingerprint, copy.copy(self.config), self.base)
        self.layout = QuantizedLayout.of(self.config)
        self.is_quantized = self.layout is not None
        if self.is_quantized:  # exported as the floating point weights that the codes stand for
            self.base = dequantized_tensors(self.base, self.config)
            without_layout(self.config)
        _check_layout(job, self.family, self.config)
        self.model = self._base_of_placeholders(job.source)
        self.weights, self.runnable, self.prefix = self.base, self.model, None
        if job.adapter_path is not None:
            self.adapter = find_adapter(job.adapter_path)
            self.runnable = load_adapter(self.adapter, self.model, scale=job.adapter_scale)
            self.weights = merge_adapter(self.base, self.runnable)
            if is_adapted(self.runnable, "lm_head"):
                self.config.tie_word_embeddings = False  # merged, it is no longer the embedding's matrix
        if job.prefix_path is not None:
            self.prefix_file = find_prefix(job.prefix_path)
            self.prefix = load_prefix(self.prefix_file, self.model)
            if job.format != "tuned":
                check_official(self.prefix, str(self.prefix_file))  # which all other formats write
            self.prefix.strength *= job.prefix_strength  # of the prefix itself from here on: it is written so
            attach_prefix(self.model, self.prefix)
        self.gguf: Written | None = None
        # After both: what they brought is real, and only placeholders are streamed.
        stream_weights(self.runnable, self.base)

    def _base_of_placeholders(self, name: str) -> PreTrainedModel:
        # A copy, as transformers writes into the configuration of a model (attention, dtype).
        model: Any = _placeholders(lambda: build_model(copy.deepcopy(self.config)))
        model.source = name
        # Taken from the files: the model's own method would look at placeholders.
        model.fingerprint, model.stored_layout = self.fingerprint, self.layout
        return model


def _placeholders(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    return build_of_placeholders(build).requires_grad_(False)  # pyright: ignore[reportReturnType]


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
    source = _Source(job, on_progress)
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


def _left_out(source: _Source, job: ExportJob) -> str:
    """Say what of a switch: no format of others holds one, and merged weights cannot be switched off."""
    if switch_of(source.runnable) is None or job.format == "tuned":
        return ""
    what = "prefix" if source.prefix is not None else "adapter"
    return (
        f"The {what} has a switch, which this format cannot hold: in the export it applies to every request. "
        f"To keep the switch, take `format=tuned`, or load base and {what} side by side in glmtune."
    )


def _check_format(job: ExportJob, family: Family) -> None:
    if job.prefix_path is not None and job.adapter_path is not None:
        raise ConfigError(
            "`prefix_path` and `adapter_path` are both set, but a model is tuned one way. Leave one out."
        )
    if job.format == "gguf":
        check_gguf(family, job.prefix_path)
    if job.format in ("transformers", "peft") and family is Family.CHATGLM:
        raise ConfigError(
            f"`format` is `{job.format}`, but transformers has no class for ChatGLM-6B (two-dimensional "
            f"positions, prefix mask). Use `format={'tuned' if job.format == 'peft' else 'official'}`."
        )
    if job.format == "peft" and job.adapter_path is None:
        raise ConfigError("`format` is `peft`, but no LoRA adapter is given. Add `adapter_path=RUN`.")
    if job.format == "transformers" and job.prefix_path is not None:
        raise ConfigError(
            "`format` is `transformers`, but `GlmForCausalLM` has no place for a prefix. Use "
            "`format=official` (base and prefix side by side) or `format=prefix`; or tune with LoRA, "
            "which can be merged."
        )
    if job.format == "prefix" and job.prefix_path is None:
        raise ConfigError("`format` is `prefix`, but no prefix is given. Add `prefix_path=RUN`.")
    if job.format == "tuned" and job.prefix_path is None and job.adapter_path is None:
        raise ConfigError(
            "`format` is `tuned`, but nothing tuned is given. Add `prefix_path=RUN` or `adapter_path=RUN`."
        )
    _check_strengths(job)


def _check_layout(job: ExportJob, family: Family, config: Any) -> None:
    """Raise ConfigError where the official layout cannot hold a folder in transformers' format."""
    if job.format != "official" or not is_transformers_format(config):
        return
    if problems := unofficial(config):
        raise ConfigError(
            f"`format` is `official`, but `{job.source}` has {' and '.join(problems)}, and the official "
            "layout has no place for that. Use `format=transformers`, which vLLM and others read, too."
        )
    if family is Family.TRANSFORMERS:
        raise ConfigError(
            f"`format` is `official`, but nothing says of which release `{job.source}` is, whose layout, "
            "tokenizer and prompts it is to have. Name it, such as `model.family=glm4` for GLM-4 (-hf); or "
            "use `format=transformers`."
        )


def _check_strengths(job: ExportJob) -> None:
    """Raise ConfigError for a strength or scale that nothing written could have."""
    check_strengths(
        prefix=job.prefix_path,
        prefix_strength=job.prefix_strength,
        adapter=job.adapter_path,
        adapter_scale=job.adapter_scale,
    )
    for name in ("prefix_strength", "adapter_scale"):
        if getattr(job, name) == 0:
            raise ConfigError(
                f"`{name}` is 0, which is the base, so nothing of what was tuned would be exported. Give a"
                " number above 0, or export the base alone."
            )
    if job.prefix_strength != 1 and job.format != "tuned":
        raise ConfigError(
            f"`prefix_strength` is {job.prefix_strength:g}, but `format={job.format}` writes the official"
            " pytorch_model.bin, which has no place for one (log strength is added to scores, which no keys"
            " and values do). Use `format=tuned`: glmtune's own file of the prefix, which glmtune obeys; or"
            " leave it out."
        )


def _write_transformers(source: _Source, folder: Path, job: ExportJob) -> int:
    write_json(folder / "config.json", transformers_values(source.config, source.dtype) | _name_of(source))
    release_generation(source.folder, source.config).save_pretrained(str(folder))
    _write_fast_tokenizer(source, folder)
    weights = without_head(source.weights) if source.config.tie_word_embeddings else source.weights
    return _write_weights(source, weights, folder, job)


def _write_fast_tokenizer(source: _Source, folder: Path) -> None:
    """Write tokenizer.json, and the vocabulary file of an official release beside it; see `JsonTokenizer`."""
    if not any((source.folder / name).is_file() for name in VOCABULARIES):
        return
    tokenizer = load_tokenizer_folder(source.folder, source.family)
    write_tokenizer(tokenizer, folder)
    if not isinstance(tokenizer, JsonTokenizer):  # which writes it by itself, where its folder has one
        tokenizer.save_vocabulary(str(folder))


def _write_official(source: _Source, folder: Path, job: ExportJob) -> int:
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


def _name_of(source: _Source) -> dict[str, str]:
    """Return the name under which the source was released, as far as its config.json tells."""
    name = read_config(source.folder).get("_name_or_path")
    return {"_name_or_path": name} if isinstance(name, str) and name else {}


def _write_weights(source: _Source, tensors: LazyTensors, folder: Path, job: ExportJob) -> int:
    written = write_shards(
        folder,
        tensors,
        dtypes=dict.fromkeys(tensors, source.dtype),
        max_shard_bytes=job.max_shard_bytes,
        on_shard=partial(source.on_progress, STAGES[0]),
    )
    return written.num_bytes


def _write_prefix(source: _Source, folder: Path, _: ExportJob) -> int:
    assert source.prefix is not None
    config = source.config
    if unofficial(config):  # no release has this base; what it is, is said all the same
        values = transformers_values(config, source.dtype)
    else:
        values = official_config(official_form(config), source.family)
    return export_official_prefix(source.prefix, folder, config=values).stat().st_size


def _write_tuned(source: _Source, folder: Path, job: ExportJob) -> int:
    if source.prefix is not None:
        return write_tuned_prefix(source.prefix, source.prefix_file, folder)
    return write_tuned_adapter(source.adapter, folder, job.adapter_scale)


def _write_peft(source: _Source, folder: Path, _: ExportJob) -> int:
    return write_peft_adapter(cast("PeftModel", source.runnable), source.adapter, folder)


def _write_gguf(source: _Source, folder: Path, job: ExportJob) -> int:
    source.gguf = Written(
        model_name(job.source), source.folder, source.config, source.family, source.weights, job.gguf_type
    )
    return write_gguf(folder, source.gguf, partial(source.on_progress, STAGES[0]))


WRITERS: dict[str, Callable[[_Source, Path, ExportJob], int]] = {
    "transformers": _write_transformers,
    "official": _write_official,
    "prefix": _write_prefix,
    "tuned": _write_tuned,
    "peft": _write_peft,
    "gguf": _write_gguf,
}


def _compare(source: _Source, folder: Path, job: ExportJob) -> tuple[float, float, float]:
    """Run the same ids through source and export; return difference, largest logit and limit."""
    ids = probe_ids(source.config)
    expected = probe_logits(source.runnable, ids, partial(source.on_progress, STAGES[1]))
    found = probe_logits(RELOADERS[job.format](source, folder), ids, partial(source.on_progress, STAGES[2]))
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


def _reload_transformers(source: _Source, folder: Path) -> PreTrainedModel:
    # Through transformers' own names and classes, as every other tool will read it: our code has no part in
    # it.
    config = AutoConfig.from_pretrained(str(folder))
    model = _placeholders(lambda: AutoModelForCausalLM.from_config(config))
    return _filled(model, stored_tensors(folder, tied=config.tie_word_embeddings), folder)


def _reload_official(source: _Source, folder: Path) -> PreTrainedModel:
    config = load_config(folder, folder)
    model = _placeholders(lambda: build_model(config))
    if source.prefix is not None:
        attach_prefix(model, load_prefix(folder / PREFIX_FOLDER, model))
    return _filled(model, native_tensors(folder, config), folder)


def _reload_prefix(source: _Source, folder: Path) -> PreTrainedModel:
    model = _placeholders(lambda: build_model(copy.deepcopy(source.config)))
    attach_prefix(model, load_prefix(folder, model))
    return _filled(model, source.base, folder)


def _reload_tuned(source: _Source, folder: Path) -> PreTrainedModel:
    # The base is that of the source, which was compared with what was tuned when it was read.
    model = _placeholders(lambda: build_model(copy.deepcopy(source.config)))
    if source.prefix is not None:
        attach_prefix(model, load_prefix(folder, model, check_base=False))
        return _filled(model, source.base, folder)
    adapted = load_adapter(folder, model, check_base=False)
    stream_weights(adapted, source.base)
    return adapted  # pyright: ignore[reportReturnType]


def _reload_peft(source: _Source, folder: Path) -> PreTrainedModel:
    adapted = read_by_peft(folder, transformers_values(source.config, torch.float32), build=_placeholders)
    stream_weights(adapted, source.base)
    return adapted


def _reload_gguf(source: _Source, folder: Path) -> PreTrainedModel:
    assert source.gguf is not None
    found, native = read_back(folder, source.gguf)
    # The model that the file describes, not the one it was made of.
    return _filled(_placeholders(lambda: AutoModelForCausalLM.from_config(found.config())), native, folder)


RELOADERS: dict[str, Callable[[_Source, Path], PreTrainedModel]] = {
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
