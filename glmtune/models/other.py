"""Causal language models that transformers alone computes: GLM's mixtures of experts, other families' models.

They are loaded from a folder, and no code of the checkpoint runs. They answer, chat and are evaluated by the
same engine and the same protocols as every GLM; what glmtune computes itself (the prefix in attention, codes,
exports) is refused by name.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.checkpoints.fingerprint import architecture_hash, sampled_signs
from glmtune.models.checkpoints.names import listed
from glmtune.models.checkpoints.shards import read_records
from glmtune.models.devices import choose_dtype
from glmtune.models.later import LaterModel
from glmtune.models.official import OfficialModel
from glmtune.models.releases.families import FAMILY_KEY, MIXTURES, Family, why_not_tuned

SPARE = 1.01
"""Files may leave out a few numbers that models form themselves."""


class OtherModel(OfficialModel):
    """What a causal language model of transformers gets from us: a name, a fingerprint, `chat`."""

    def fingerprint(self) -> str:
        """Identify the weights and the configuration; what is attached does not change it.

        Returns:
            64 hexadecimal digits.
        """
        digest = hashlib.sha256(architecture_hash(self.config).encode())
        for name, tensor in sorted(self.named_parameters()):
            if ".lora_" not in name:
                digest.update(name.replace(".base_layer", "").encode() + sampled_signs(tensor))
        return digest.hexdigest()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write as transformers does."""
        cast(Any, PreTrainedModel).save_pretrained(self, save_directory, *args, **kwargs)


class MixtureModel(OtherModel, LaterModel):
    """A GLM with a mixture of experts: a LoRA on its attention can be trained."""


@lru_cache
def _class_for(parent: type) -> type:
    is_mixture = parent.config_class.model_type in MIXTURES  # pyright: ignore[reportAttributeAccessIssue]
    ours = MixtureModel if is_mixture else OtherModel
    return type(f"Official{parent.__name__}", (ours, parent), {})


def load_other(
    source: str | Path,
    folder: Path,
    *,
    model_type: str,
    dtype: str | torch.dtype | None,
    device: torch.device,
    attn_implementation: str | None,
) -> Any:
    """Load a causal language model of transformers that is none of glmtune's own.

    Args:
        source: as the user named it.
        folder: where it lies.
        model_type: of its config.json.
        dtype: see `load_official`.
        device: where it goes.
        attn_implementation: a name transformers knows; None: sdpa where there is one. Never the
            file's, which may name code.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: no causal language model, weights of another tool's codes, damaged.
    """
    if read_config(folder).get("quantization_config") is not None:
        raise CheckpointError(
            f"{folder}: the weights are codes of another tool (`quantization_config`). Load the release that "
            "they were made from."
        )
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        parent: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (KeyError, ValueError, OSError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: model_type is `{model_type}`, and transformers has no causal language model for this "
            f"config.json ({str(error)[:200]}). Take a checkpoint of text in, text out."
        ) from error
    attention = attn_implementation or ("sdpa" if parent._supports_sdpa else "eager")
    config._attn_implementation = attention  # before anything is built: the file's may name a hub's kernels
    count = _check_size(folder, parent, config)
    chosen = choose_dtype(dtype, device, stored=config.dtype, num_parameters=count)
    setattr(config, FAMILY_KEY, Family.TRANSFORMERS.value)
    try:
        model, loaded = _class_for(parent).from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
            str(folder),
            config=config,
            dtype=chosen,
            local_files_only=True,
            output_loading_info=True,
            attn_implementation=attention,
        )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load it ({type(error).__name__}: {str(error)[:300]})."
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing: {listed(missing)}. config.json and the weights "
            "must be of the same, complete checkpoint."
        )
    model.source, model.stored_dtype = str(source), config.dtype
    return model.to(device).eval()


def _check_size(folder: Path, parent: Any, config: Any) -> int:
    """Compare the size that config.json asks for with that of the weights, before anything is built of it.

    transformers would draw what is missing at random: a file of 1 KB could ask for any amount of memory.

    Returns:
        Numbers in the weight files.

    Raises:
        CheckpointError: there are far fewer than the model has.
    """
    records = read_records(folder)
    count = sum(math.prod(record.shape) for record in records.values())
    layers = getattr(config, "num_hidden_layers", 0)
    asked = 0
    # More layers than tensors cannot be: a million of them take minutes to build even without memory.
    if isinstance(layers, int) and layers <= len(records):
        with torch.device("meta"):
            model: Any = parent(config)
        model.tie_weights()
        asked = model.num_parameters()
    if not asked or asked > count * SPARE:
        raise CheckpointError(
            f"{folder}: config.json asks for {f'{asked:,}' if asked else 'far more'} numbers ({layers} "
            f"layers), but the weight files hold {count:,}. They must be of the same, complete checkpoint."
        )
    return count


def check_tunable(model: Any, tune: str) -> None:
    """Refuse to tune a model that transformers alone computes, but for a LoRA on GLM's mixtures of experts.

    Args:
        model: a loaded base.
        tune: ``prefix``, ``lora`` or ``full``.

    Raises:
        ConfigError: it is an `OtherModel` that cannot be tuned so.
    """
    if not isinstance(model, OtherModel) or (isinstance(model, MixtureModel) and tune == "lora"):
        return
    kind = model.config.model_type
    if isinstance(model, MixtureModel):
        raise ConfigError(why_not_tuned(kind, tune))
    raise ConfigError(
        f"`tune` is `{tune}`, but model_type `{kind}` is no GLM: glmtune evaluates and asks it, as a "
        "baseline (`glmtune eval`, `compare`, `chat`), and tunes only GLMs. Name one, such as "
        "`model=glm-edge-1.5b-chat`."
    )
