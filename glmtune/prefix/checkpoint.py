"""Save a tuned prefix and load it again: our safetensors file, and the official `pytorch_model.bin`.

The official file holds bare tensors: nothing in it tells which base they belong to. Ours holds the same
tensors under the same names and, as metadata, geometry and origin, so that a wrong base is refused when it
is loaded and not noticed, at best, from nonsense answers.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.checkpoints.finite import check_savable, first_not_finite
from glmtune.models.checkpoints.headers import TensorRecord, records_of
from glmtune.models.checkpoints.shards import OpenShards
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from glmtune.prefix.file_checks import (
    GATE,
    OFFICIAL_NAME,
    STRENGTH,
    check_gate,
    check_matrices,
    check_metadata,
    check_names,
    check_shape,
    is_count,
)
from glmtune.storage.files import write_atomically, write_json
from glmtune.storage.json_files import parse_json, read_json_object
from glmtune.storage.manifest import check_files
from glmtune.switch.rule import METADATA_KEY, TENSORS, Switch, SwitchFacts
from glmtune.tuned_files import PREFIX_FILE, TrainedOn, check_same_base, find_tuned
from glmtune.version import __version__

OFFICIAL_FILE = "pytorch_model.bin"
FORMAT = "glmtune-prefix-1"
"""Of the metadata, for a reader that has to tell versions apart."""
HEADER_LENGTH = struct.Struct("<Q")
"""What a safetensors file begins with."""
DAMAGE = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, MemoryError, LookupError,
          ValueError, TypeError, EOFError, OSError)  # fmt: skip
"""What reading a broken file raises: safetensors and PyTorch's unpickler each their own."""


@dataclass(frozen=True, slots=True)
class PrefixMeta:
    """What a saved prefix remembers about its making; empty strings mean "not known".

    Attributes:
        base_fingerprint: ``model.fingerprint()`` of the base it was trained on.
        base_source: what that base was called when it was loaded.
        template: name of the prompt template of its training rows.
        data_fingerprint: identity of its training data.
        glmtune_version: the version that wrote the file.
        trained_with: what shaped its prompts, JSON of `glmtune.data.as_trained.record`.
    """

    base_fingerprint: str = ""
    base_source: str = ""
    template: str = ""
    data_fingerprint: str = ""
    glmtune_version: str = __version__
    trained_with: str = ""


@dataclass(frozen=True, slots=True)
class PrefixDescription:
    """What can be said of a saved prefix without a model.

    Attributes:
        file: where it lies.
        pre_seq_len: prefix positions.
        prefix_projection: whether it is re-parameterised through an MLP.
        gate: whether it has a softmax of its own and gates.
        meta: what it remembers about its making.
        strength: with which it was exported; 1: as it was tuned.
        switch: how well its switch does; None where it has none, and applies to every request.
    """

    file: Path
    pre_seq_len: int
    prefix_projection: bool
    gate: bool
    meta: PrefixMeta
    strength: float = 1.0
    switch: SwitchFacts | None = None


def save_prefix(
    encoder: PrefixEncoder,
    folder: str | Path,
    *,
    meta: PrefixMeta | None = None,
    state: Mapping[str, Tensor] | None = None,
    switch: Switch | None = None,
) -> Path:
    """Write ``prefix_encoder.safetensors``: float32 weights, geometry, and where the prefix comes from.

    The file appears complete or not at all; an older one of that name stays until then.

    Args:
        encoder: the prefix.
        folder: created if absent.
        meta: what the file will say about the base and the data.
        state: the weights, where they are not the encoder's own (put together by a trainer).
        switch: decides per request whether the prefix applies; None: the encoder's own, if it has one.

    Returns:
        The file.

    Raises:
        OSError: the folder is not writable or the disk is full; an older file is intact.
        CheckpointError: the weights are not finite; an older file is intact.
    """
    metadata = {
        "format": FORMAT,
        "pre_seq_len": encoder.pre_seq_len,
        "prefix_projection": encoder.prefix_projection,
        **({} if encoder.gate is None else {"gate": True}),
        **dataclasses.asdict(encoder.shape),
        **dataclasses.asdict(meta or PrefixMeta()),
    }
    if encoder.strength != 1:  # an older glmtune refuses a key of numbers, and so does not answer otherwise
        metadata[STRENGTH] = encoder.strength
    weights = encoder.state_dict() if state is None else state
    check_savable(Path(folder), weights.items())
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    if (rule := switch or encoder.switch) is not None:
        tensors |= rule.tensors()
        metadata[METADATA_KEY] = dataclasses.asdict(rule.facts)
    content = _in_order(
        save(tensors, {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()})
    )
    target = Path(folder) / PREFIX_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda partial: partial.write_bytes(content))
    return target


def find_prefix(path: str | Path) -> Path:
    """Find the file of a saved prefix.

    Args:
        path: a file, a folder holding one (ours before the official one), or a run folder: then its ``last``,
            else its newest ``checkpoint-N``.

    Returns:
        The file.

    Raises:
        CheckpointError: nothing there, with the places looked at.
    """
    place = Path(path).expanduser()
    if place.is_file():
        check_files(place.parent, (place.name,))
        return place
    return find_tuned(
        place,
        (PREFIX_FILE,),
        (OFFICIAL_FILE,),
        what="prefix",
        absent=f"{PREFIX_FILE} and no official {OFFICIAL_FILE}",
        or_give=", or the file itself",
    )


def describe_prefix(path: str | Path) -> PrefixDescription:
    """Read what a saved prefix is and where it comes from, without a model.

    Args:
        path: as for `find_prefix`.

    Returns:
        The description; what it says about its making is empty for an official checkpoint, which tells
        nothing.

    Raises:
        CheckpointError: there is no prefix, or the file is damaged.
    """
    file = find_prefix(path)
    weights, metadata = _read(file)
    switch = _take_switch(file, weights, metadata)
    names = [field.name for field in dataclasses.fields(PrefixMeta)]
    return PrefixDescription(
        file=file,
        pre_seq_len=weights["embedding.weight"].shape[0],
        prefix_projection="trans.0.weight" in weights,
        gate=GATE in weights,
        meta=PrefixMeta(**{name: str(metadata.get(name, "")) for name in names}),
        strength=float(metadata.get(STRENGTH, 1.0)),
        switch=None if switch is None else switch.facts,
    )


def load_prefix(path: str | Path, model: PreTrainedModel, *, check_base: bool = True) -> PrefixEncoder:
    """Load a prefix for a base; its length, projection and gate are read from the file.

    Attaching is a separate step.

    Args:
        path: as for `find_prefix`.
        model: the base the prefix is for.
        check_base: refuse a prefix whose file names another base. Its shape must fit in any case. The base
            quantized is no other base; of released INT8 and INT4 files, which do not tell what they were
            made from, only the prompt template is compared (and a warning logged). Official prefixes, and
            models without `fingerprint()`, name no base.

    Returns:
        The encoder, float32, on the CPU.

    Raises:
        CheckpointError: nothing there, damaged, of another geometry, or trained on another base.
    """
    file = find_prefix(path)
    weights, metadata = _read(file)
    switch = _take_switch(file, weights, metadata)
    expected = prefix_shape(model.config)
    check_shape(file, weights, metadata, expected)
    check_gate(file, weights, model)
    if check_base:
        trained_on = TrainedOn(
            str(metadata.get("base_fingerprint", "")), str(metadata.get("base_source", ""))
        )
        check_same_base(
            f"prefix `{file}`", trained_on, model, may_belong=lambda: _is_of_template(metadata, model)
        )
    projected = "trans.0.weight" in weights
    length, width = weights["embedding.weight"].shape
    encoder = PrefixEncoder(
        expected,
        pre_seq_len=length,
        hidden_size=weights["trans.0.weight"].shape[0] if projected else None,
        embedding_width=width if projected else None,
        num_gates=weights[GATE].shape[1] if GATE in weights else None,
    )
    encoder.load_state_dict({name: weight.float() for name, weight in weights.items()})
    if switch is not None:
        switch.check_width(model.config.hidden_size, f"prefix `{file}`")
        encoder.switch = switch
    encoder.strength = float(metadata.get(STRENGTH, 1.0))
    return encoder


def export_official_prefix(
    encoder: PrefixEncoder, folder: str | Path, *, config: Mapping[str, Any] | None = None
) -> Path:
    """Write a prefix as the official training script leaves it; a switch has no place there and is left out.

    Args:
        encoder: the prefix.
        folder: created if absent; ``pytorch_model.bin`` and ``config.json`` in it are replaced.
        config: the base's official config; ``pre_seq_len`` and ``prefix_projection`` are added to it.

    Returns:
        The weight file.

    Raises:
        ConfigError: it has a gate or a strength; see `check_official`.
        OSError: the folder is not writable or the disk is full.
    """
    check_official(encoder)
    target = Path(folder) / OFFICIAL_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    # In memory first: PyTorch's own writer calls a full disk a fault of its archive.
    content = io.BytesIO()
    torch.save({OFFICIAL_NAME + key: weight.cpu() for key, weight in encoder.state_dict().items()}, content)
    write_atomically(target, lambda partial: partial.write_bytes(content.getbuffer()))
    keys = {"pre_seq_len": encoder.pre_seq_len, "prefix_projection": encoder.prefix_projection}
    write_json(target.with_name("config.json"), {**(config or {}), **keys})
    return target


def check_official(encoder: PrefixEncoder, name: str = "") -> None:
    """Make sure that the official files can hold a prefix.

    Args:
        encoder: the prefix.
        name: of its file, for the error.

    Raises:
        ConfigError: it has a gate, or a strength.
    """
    if encoder.strength != 1:
        raise ConfigError(
            f"The strength of the prefix{f' `{name}`' if name else ''} is {encoder.strength:g}, but the "
            f"official {OFFICIAL_FILE} has no place for one: it adds log strength to scores, which no other "
            "keys and values do. Use `format=tuned`, which writes glmtune's own file, or leave the strength "
            "at 1."
        )
    if encoder.gate is not None:
        raise ConfigError(
            f"The prefix{f' `{name}`' if name else ''} was tuned with `prefix.gate=true`, but the model code "
            "of the releases has one softmax over prefix and tokens and no place for a gate: it would "
            f"compute something else from these files. Use it as it is, in glmtune ({PREFIX_FILE}: "
            "`prefix_path=` of chat, serve, predict and eval, `prefix=` of `load_model`), or tune one with "
            "`prefix.gate=false`, or LoRA, which can be merged."
        )


def _in_order(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file, which the library writes in an order of chance.

    One prefix is one file then, to the byte, whenever and wherever it is saved.
    """
    start = HEADER_LENGTH.size
    end = start + HEADER_LENGTH.unpack_from(content)[0]
    header = json.loads(content[start:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % start)  # tensors begin at a multiple of 8
    return HEADER_LENGTH.pack(len(text)) + text + content[end:]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights by their short names, and the metadata stored with them; names and shapes fit.

    The header comes first: what it says is compared with the bytes that are there before memory is asked for,
    and of a whole checkpoint with a prefix in it only the prefix is read.
    """
    is_ours = file.suffix == ".safetensors"
    with OpenShards() as shards:
        with _as_prefix(file):
            records: Mapping[str, TensorRecord | Tensor]
            if is_ours or _is_zip(file):
                records = {record.name: record for record in records_of(file, shards.stream(file))}
            else:
                records = _read_legacy(file)
        records = _short_names(records)
        check_names(file, records)
        check_matrices(file, {name: tuple(record.shape) for name, record in records.items()})
        with _as_prefix(file):
            weights = {
                name: record if isinstance(record, Tensor) else shards.read(record)
                for name, record in records.items()
            }
            metadata = _own_metadata(file) if is_ours else _official_metadata(file.with_name("config.json"))
    check_metadata(file, weights, metadata)
    if (name := first_not_finite(weights.items())) is not None:
        raise CheckpointError(
            f"The prefix `{file}` holds numbers that are not finite (NaN or infinity), first in {name}: it "
            "was saved by a run that had diverged, or is damaged. Take an earlier checkpoint of the run."
        )
    return weights, metadata


def _take_switch(file: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> Switch | None:
    """Take the tensors and facts of a switch out of what was read; None: there is none.

    Raises:
        CheckpointError: a part of it is missing or damaged.
    """
    tensors = {name: weights.pop(name) for name in sorted(TENSORS & set(weights))}
    facts = metadata.pop(METADATA_KEY, None)
    return Switch.from_file(file, tensors, facts) if tensors or facts is not None else None


@contextmanager
def _as_prefix(file: Path) -> Generator[None]:
    try:
        yield
    except (*DAMAGE, CheckpointError) as error:
        raise CheckpointError(
            f"`{file}` could not be read as a prefix: {error}. It is damaged, or of another format; "
            f"expected is our {PREFIX_FILE} or an official {OFFICIAL_FILE}."
        ) from error


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _read_legacy(file: Path) -> dict[str, Tensor]:
    """Read a file of `torch.save` before PyTorch 1.6: no zip, so there are no checksums to compare."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it holds other things than tensors by name")
    for name, tensor in state.items():
        # A view may repeat one number for ever: as large as a header likes, in a file of a kilobyte.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is larger than the numbers that are stored for it")
    return state


def _short_names(named: Mapping[str, Any]) -> dict[str, Any]:
    # The official script saves trained parameters by their full names, some forks the encoder's alone or
    # below further wrappers; what stands behind the marker is the same in all.
    marker = "prefix_encoder."
    short = {name.partition(marker)[2]: value for name, value in named.items() if marker in name}
    return short or dict(named)


def _own_metadata(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        stored: dict[str, str] = opened.metadata() or {}
    return (
        {key: parse_json(value.encode()) for key, value in stored.items()} if "pre_seq_len" in stored else {}
    )


def _official_metadata(config_file: Path) -> dict[str, Any]:
    """Read the geometry from an official config beside a prefix, for error messages; {} where it is absent.

    Length and projection are not read: the weights tell them, while some public configs hold a nested list as
    ``prefix_projection``. What is no size there is as good as absent.
    """
    if not config_file.is_file():
        return {}
    config = read_json_object(config_file)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if "inner_hidden_size" in config and is_count(heads) and is_count(hidden):
        # ChatGLM-6B: as many key/value heads as query heads
        config |= {"multi_query_group_num": heads, "kv_channels": hidden // heads}
    names = {"num_layers": "num_layers", "num_kv_heads": "multi_query_group_num", "head_dim": "kv_channels"}
    sizes = {ours: config[name] for ours, name in names.items() if is_count(config.get(name))}
    source = config.get("_name_or_path")
    return {**sizes, "base_source": source} if isinstance(source, str) else sizes


def _is_of_template(metadata: Mapping[str, Any], model: PreTrainedModel) -> bool:
    from glmtune.models.templates.renderer import template_for

    return metadata.get("template") == template_for(getattr(model, "family", "")).name
