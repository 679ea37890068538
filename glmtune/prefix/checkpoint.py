"""Save a tuned prefix and load it again: our safetensors file, and the official `pytorch_model.bin`.

The official file holds bare tensors: nothing in it tells which base they belong to. Ours holds the same
tensors under the same names and, as metadata, geometry and origin, so that a wrong base is refused when it
is loaded and not noticed, at best, from nonsense answers.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from glmtune.errors import CheckpointError
from glmtune.files import write_atomically, write_json
from glmtune.prefix.encoder import PrefixEncoder, PrefixShape, prefix_shape
from glmtune.tuned_files import TrainedOn, check_same_base, find_tuned
from glmtune.version import __version__

PREFIX_FILE = "prefix_encoder.safetensors"
OFFICIAL_FILE = "pytorch_model.bin"
OFFICIAL_NAME = "transformer.prefix_encoder."
FORMAT = "glmtune-prefix-1"
"""Of the metadata, for a reader that has to tell versions apart."""
DAMAGE = (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile)
"""What reading a broken file raises: safetensors, pickle and zip (the container of `torch.save`) each their
own."""
WEIGHTS = frozenset({"embedding.weight"})
PROJECTION_WEIGHTS = WEIGHTS | {"trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"}


@dataclass(frozen=True, slots=True)
class PrefixMeta:
    """What a saved prefix remembers about its making; empty strings mean "not known".

    Attributes:
        base_fingerprint: ``model.fingerprint()`` of the base it was trained on.
        base_source: what that base was called when it was loaded.
        template: name of the prompt template of its training rows.
        data_fingerprint: identity of its training data.
        glmtune_version: the version that wrote the file.
    """

    base_fingerprint: str = ""
    base_source: str = ""
    template: str = ""
    data_fingerprint: str = ""
    glmtune_version: str = __version__


@dataclass(frozen=True, slots=True)
class PrefixDescription:
    """What can be said of a saved prefix without a model.

    Attributes:
        file: where it lies.
        pre_seq_len: prefix positions.
        prefix_projection: whether it is re-parameterised through an MLP.
        meta: what it remembers about its making.
    """

    file: Path
    pre_seq_len: int
    prefix_projection: bool
    meta: PrefixMeta


def save_prefix(
    encoder: PrefixEncoder,
    folder: str | Path,
    *,
    meta: PrefixMeta | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``prefix_encoder.safetensors``: float32 weights, geometry, and where the prefix comes from.

    The file appears complete or not at all; an older one of that name stays until then.

    Args:
        encoder: the prefix.
        folder: created if absent.
        meta: what the file will say about the base and the data.
        state: the weights, where they are not the encoder's own (put together by a trainer).

    Returns:
        The file.

    Raises:
        OSError: the folder is not writable or the disk is full; an older file is intact.
    """
    metadata = {
        "format": FORMAT,
        "pre_seq_len": encoder.pre_seq_len,
        "prefix_projection": encoder.prefix_projection,
        **dataclasses.asdict(encoder.shape),
        **dataclasses.asdict(meta or PrefixMeta()),
    }
    weights = encoder.state_dict() if state is None else state
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    content = save(tensors, {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()})
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
    _check_names(file, weights)
    names = [field.name for field in dataclasses.fields(PrefixMeta)]
    return PrefixDescription(
        file=file,
        pre_seq_len=weights["embedding.weight"].shape[0],
        prefix_projection="trans.0.weight" in weights,
        meta=PrefixMeta(**{name: str(metadata.get(name, "")) for name in names}),
    )


def load_prefix(path: str | Path, model: PreTrainedModel, *, check_base: bool = True) -> PrefixEncoder:
    """Load a prefix for a base; length and projection are read from the file. Attaching is a separate step.

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
    expected = prefix_shape(model.config)
    _check_names(file, weights)
    _check_shape(file, weights, metadata, expected)
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
    )
    encoder.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return encoder


def export_official_prefix(
    encoder: PrefixEncoder, folder: str | Path, *, config: Mapping[str, Any] | None = None
) -> Path:
    """Write a prefix as the official training script leaves it.

    Args:
        encoder: the prefix.
        folder: created if absent; ``pytorch_model.bin`` and ``config.json`` in it are replaced.
        config: the base's official config; ``pre_seq_len`` and ``prefix_projection`` are added to it.

    Returns:
        The weight file.

    Raises:
        OSError: the folder is not writable or the disk is full.
    """
    target = Path(folder) / OFFICIAL_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save({OFFICIAL_NAME + key: weight.cpu() for key, weight in encoder.state_dict().items()}, target)
    keys = {"pre_seq_len": encoder.pre_seq_len, "prefix_projection": encoder.prefix_projection}
    write_json(target.with_name("config.json"), {**(config or {}), **keys})
    return target


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights by their short names, and the metadata stored with them."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                stored: dict[str, str] = opened.metadata() or {}
            metadata = (
                {key: json.loads(value) for key, value in stored.items()} if "pre_seq_len" in stored else {}
            )
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
            metadata = _official_metadata(file.with_name("config.json"))
    except DAMAGE as error:
        raise CheckpointError(
            f"`{file}` could not be read as a prefix: {error}. It is damaged, or of another format; "
            f"expected is our {PREFIX_FILE} or an official {OFFICIAL_FILE}."
        ) from error
    # The official script saves trained parameters by their full names, some forks the encoder's alone or
    # below further wrappers; what stands behind the marker is the same in all.
    marker = "prefix_encoder."
    named = {name.partition(marker)[2]: weight for name, weight in weights.items() if marker in name}
    return named or weights, metadata


def _official_metadata(config_file: Path) -> dict[str, Any]:
    """Read the geometry from an official config beside a prefix, for error messages; {} where it is absent.

    Length and projection are not read: the weights tell them, while some public configs hold a nested list as
    ``prefix_projection``.
    """
    if not config_file.is_file():
        return {}
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if "inner_hidden_size" in config:  # ChatGLM-6B: as many key/value heads as query heads
        heads = config.get("num_attention_heads", 1)
        config |= {"multi_query_group_num": heads, "kv_channels": config.get("hidden_size", 0) // heads}
    names = {
        "num_layers": "num_layers",
        "num_kv_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
        "base_source": "_name_or_path",
    }
    return {ours: config[official] for ours, official in names.items() if official in config}


def _check_names(file: Path, weights: Mapping[str, Tensor]) -> None:
    found = set(weights)
    expected = PROJECTION_WEIGHTS if any(name.startswith("trans.") for name in found) else WEIGHTS
    if found != expected:
        shown = ", ".join(sorted(found)[:6]) + (", ..." if len(found) > 6 else "")
        missing, unexpected = sorted(expected - found), sorted(found - expected)
        raise CheckpointError(
            f"`{file}` holds no prefix encoder: {len(missing)} of its tensors are missing "
            f"({', '.join(missing) or 'none'}) and {len(unexpected)} do not belong to one. "
            f"It holds: {shown}. "
            f"Expected are {', '.join(sorted(expected))}, in official files after `{OFFICIAL_NAME}`."
        )


def _check_shape(
    file: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any], expected: PrefixShape
) -> None:
    """Refuse a prefix made for another number of layers, heads or channels."""
    width = weights.get("trans.2.weight", weights["embedding.weight"].T).shape[0]
    sizes = {name: metadata[name] for name in ("num_layers", "num_kv_heads", "head_dim") if name in metadata}
    known = PrefixShape(**sizes) if len(sizes) == 3 else None
    if width == expected.kv_width and known in (None, expected):
        return
    actual = str(known) if known is not None else "a geometry it does not name"
    raise CheckpointError(
        f"The prefix `{file}` does not fit the model: it was made for {actual} ({width} numbers per "
        f"position), the model has {expected} ({expected.kv_width} numbers per position). "
        "Load it with the base it was trained on."
    )


def _is_of_template(metadata: Mapping[str, Any], model: PreTrainedModel) -> bool:
    from glmtune.models.templates.renderer import template_for

    return metadata.get("template") == template_for(getattr(model, "family", "")).name
