"""Begin a new run from what was tuned before: a saved prefix, an adapter, or a whole model.

Files are read at step 0 alone. From the first checkpoint on the run goes on from its own, and the files that
it began with may be moved, changed or deleted; `StartedFrom`, in every manifest, remembers which they were.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from glmtune.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_sha256,
    check_adapter,
    find_adapter,
    fitting_weights,
)
from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.load import is_quantized
from glmtune.models.placeholders import pending_weights
from glmtune.prefix.checkpoint import PREFIX_FILE, find_prefix, load_prefix
from glmtune.prefix.encoder import PrefixEncoder
from glmtune.prefix.init import take_over
from glmtune.prefix.settings import PrefixSettings
from glmtune.storage.manifest import MANIFEST
from glmtune.terminal.console import Console
from glmtune.training.adapt import Tuned, TunedAdapter, TunedModel, TunedPrefix
from glmtune.training.checkpoints.folder import read_manifest
from glmtune.training.config import RunConfig
from glmtune.training.distributed import collectives
from glmtune.training.settings import LoraSettings
from glmtune.tuned_files import TrainedOn, check_same_base, find_tuned

KEY = "started_from"
"""Of manifests and results."""
CONFIG = "config.json"
WEIGHT_FILES = (
    *((CONFIG, "model.safetensors"), (CONFIG, "model.safetensors.index.json")),
    *((CONFIG, "pytorch_model.bin"), (CONFIG, "pytorch_model.bin.index.json")),
)
KINDS = {
    "prefix_path": ("a prefix", "+recipe=ptuning prefix_path={path}", ((PREFIX_FILE,),)),
    "adapter_path": ("an adapter", "+recipe=lora adapter_path={path}", ((ADAPTER_FILE, ADAPTER_CONFIG),)),
    "init_from": ("a whole model", "+recipe=full init_from={path}", WEIGHT_FILES),
}
"""Settings that name what to begin with: what it is, the words that begin with it, its files."""


@dataclass(frozen=True, slots=True)
class StartedFrom:
    """What a run began with.

    Attributes:
        path: of the file or folder, as it was called then.
        fingerprint: 64 hexadecimal digits: of a model's weights, else SHA-256 of the file or files.
    """

    path: str
    fingerprint: str


def remembered(checkpoint: Path) -> StartedFrom | None:
    """Return what the run of a checkpoint began with; None: nothing tuned before."""
    found = (read_manifest(checkpoint) or {}).get(KEY)
    return StartedFrom(str(found["path"]), str(found["fingerprint"])) if isinstance(found, Mapping) else None


def as_values(started_from: StartedFrom | None) -> dict[str, Any]:
    """Return what manifests and results hold of it: nothing, where a run began with nothing tuned."""
    return {} if started_from is None else {KEY: dataclasses.asdict(started_from)}


def begin_with(config: RunConfig, tuned: Tuned, checkpoint: Path | None) -> StartedFrom | None:
    """Give what a run tunes the values of what was tuned before, if named; every process must call this.

    Args:
        config: all settings; ``prefix_path``, ``adapter_path`` and ``init_from`` are read.
        tuned: as made by the settings; mutated.
        checkpoint: where the run goes on from: then no file is read, and its manifest tells what was.

    Returns:
        What the run began with; None: nothing tuned before.

    Raises:
        CheckpointError: nothing there, damaged, of another base, or of another shape.
        ConfigError: it cannot be made into what the settings ask for, or is of another kind.
    """
    if checkpoint is not None:
        return remembered(checkpoint)
    with collectives.propagate_errors():
        found: StartedFrom | Path | None = None
        if config.prefix_path is not None and isinstance(tuned, TunedPrefix) and config.prefix is not None:
            found = _begin_with_prefix(config.prefix_path, tuned, config.prefix)
        if config.adapter_path is not None and isinstance(tuned, TunedAdapter) and config.lora is not None:
            found = _begin_with_adapter(config.adapter_path, tuned, config.lora)
        if config.init_from is not None and isinstance(tuned, TunedModel):
            found = _begin_with_weights(config.init_from, tuned, source=config.model.source)
    # Outside the block, which may end in one process alone: to identify sharded weights is a collective.
    return _identified(found, tuned) if isinstance(found, Path) else found


def _begin_with_prefix(path: str, tuned: TunedPrefix, settings: PrefixSettings) -> StartedFrom:
    """Give a new prefix the values of a saved one; see `glmtune.prefix.init.take_over` for other shapes."""
    _refuse_other_kinds("prefix_path", path)
    file = find_prefix(path)
    saved = load_prefix(file, tuned.model)
    if saved.strength != 1:
        raise ConfigError(
            f"`prefix_path` is `{path}`, which was exported with a strength of {saved.strength:g}, but"
            " training knows none. Begin with the run that it was exported from."
        )
    take_over(saved, tuned.encoder, settings, str(file))
    _say(_described(file, saved, tuned.encoder))
    return StartedFrom(str(file.resolve()), hashlib.sha256(file.read_bytes()).hexdigest())


def _described(file: Path, saved: PrefixEncoder, encoder: PrefixEncoder) -> str:
    before, now = saved.pre_seq_len, encoder.pre_seq_len
    text = f"beginning with the prefix {file}"
    if now > before:
        text += f": its {before} positions and {now - before} fresh ones behind them"
    if now < before:
        text += f": the first {now} of its {before} positions; the others are left out"
    baked = saved.prefix_projection and not encoder.prefix_projection
    return text + (" (its projection computed once, its keys and values tuned on)" if baked else "")


def _begin_with_adapter(path: str, tuned: TunedAdapter, settings: LoraSettings) -> StartedFrom:
    """Give new adapters the values of saved ones of the same layers and rank."""
    from peft import set_peft_model_state_dict

    _refuse_other_kinds("adapter_path", path)
    folder = find_adapter(path)
    check_adapter(folder, cast(PreTrainedModel, tuned.model.get_base_model()))
    stored = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    _check_lora(folder, stored, tuned, settings)
    weights = fitting_weights(folder, tuned.model)
    # What an adapter adds is scale * B A: under another alpha B takes up the difference, so it adds the same.
    rank = stored["r"]
    before = stored["lora_alpha"] / (math.sqrt(rank) if stored.get("use_rslora") else rank)
    factor = before / (settings.alpha / settings.rank)
    if factor != 1:
        weights = {name: value * factor if ".lora_B." in name else value for name, value in weights.items()}
    set_peft_model_state_dict(tuned.model, weights)
    _say(f"beginning with the adapter {folder}")
    return StartedFrom(str(folder.resolve()), adapter_sha256(folder))


def _check_lora(folder: Path, stored: Mapping[str, Any], tuned: TunedAdapter, settings: LoraSettings) -> None:
    """Compare rank and layers by the names of their settings, before tensors are compared."""
    merge = (
        f"Or merge it, `glmtune export adapter_path={folder} output_dir=MERGED`, and tune "
        "`model.source=MERGED`."
    )
    try:
        rank, alpha = int(stored["r"]), float(stored["lora_alpha"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} does not say its rank (`r`) and scale (`lora_alpha`) in numbers. "
            "Copy it from the training run again."
        ) from None
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if stored.get(name)]
    if patterns or rank < 1 or not alpha > 0:
        odd = patterns or ["r", "lora_alpha"]
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} has {', '.join(f'{name} = {stored[name]!r}' for name in odd)}, but "
            f"adapters of one rank and one scale above 0 are tuned here. {merge}"
        )
    if rank != settings.rank:
        raise ConfigError(
            f"`lora.rank` is {settings.rank}, but the adapter in {folder} has rank {rank}, and its matrices "
            f"cannot be given another. Add `lora.rank={rank}`. {merge}"
        )
    config: Any = tuned.model.peft_config["default"]
    targets, wanted = stored.get("target_modules"), config.target_modules
    if isinstance(targets, list) and set(targets) != set(wanted or ()):
        listed = ",".join(sorted(map(str, targets)))
        raise ConfigError(
            f"`lora.targets` are {', '.join(sorted(wanted or ()))}, but the adapter in {folder} is on "
            f"{listed}. Add `lora.targets=[{listed}]`. {merge}"
        )


def _begin_with_weights(path: str, tuned: TunedModel, *, source: str) -> Path:
    """Give a model the weights of a fully tuned one; the base's tokenizer and identity stay.

    A run folder stands for its ``last``, else for its newest ``checkpoint-N``.
    """
    _refuse_other_kinds("init_from", path)
    folder = find_tuned(
        path,
        *WEIGHT_FILES,
        what="tuned model",
        absent=f"{CONFIG} with model.safetensors or pytorch_model.bin",
    ).parent
    if is_quantized(str(folder), str(tuned.model.family)):
        raise ConfigError(
            f"`init_from` is `{path}`, whose weights are codes, and codes cannot be trained. Name the run or "
            "the export from before it was quantized."
        )
    manifest = _manifest_beside(folder)
    trained_on = TrainedOn(str(manifest.get("base_fingerprint", "")), "the base of that run")
    check_same_base(f"model in `{folder}`", trained_on, tuned.model, may_belong=lambda: False)
    tuned.check(folder)
    tuned.load(folder)
    _say(f"beginning with the weights in {folder}, in place of those of {source}")
    return folder


def _identified(folder: Path, tuned: Tuned) -> StartedFrom:
    """Identify the weights that a model has just been given."""
    assert isinstance(tuned, TunedModel)
    pending = pending_weights(tuned.model)
    if pending is None:
        return StartedFrom(str(folder.resolve()), tuned.model.fingerprint())
    return StartedFrom(str(folder.resolve()), collectives.broadcast_from_main(pending.fingerprint))


def _manifest_beside(folder: Path) -> dict[str, Any]:
    """Return the manifest in the folder of weights; {} where no run of ours left them (an export)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(
            f"{folder / MANIFEST} is no valid JSON ({error}), so it does not tell which base the weights "
            "beside it belong to. Copy the folder from the training run again."
        ) from None
    return manifest if isinstance(manifest, dict) else {}


def _refuse_other_kinds(setting: str, path: str) -> None:
    """Name the setting that begins with what is there, where it is not the one that was used.

    Raises:
        ConfigError: something else was tuned there.
    """
    # A model's pytorch_model.bin has the name of an official prefix's, so what was asked for comes first.
    if _holds(setting, path) or Path(path).expanduser().is_file():
        return
    for other, (what, words, _) in KINDS.items():
        if other != setting and _holds(other, path):
            raise ConfigError(
                f"`{setting}` is `{path}`, but what was tuned there is {what}, not {KINDS[setting][0]}. Use "
                f"`{words.format(path=path)}`."
            )


def _holds(setting: str, path: str) -> bool:
    alternatives = KINDS[setting][2]
    if setting == "prefix_path":
        alternatives = (*alternatives, ("pytorch_model.bin",))
    try:
        find_tuned(path, *alternatives, what="", absent="")
    except CheckpointError:
        return False
    return True


def _say(text: str) -> None:
    if collectives.is_main_process():
        Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
