"""Arguments of ``from_pretrained`` as users of the releases write them: obeyed, without effect, or refused.

Nothing is dropped in silence. What has no effect is a short list with a reason each (`SATISFIED`); what
cannot be done says what to write instead (`INSTEAD`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError, unknown_name
from glmtune.models.releases.source import family_of_source, is_downloaded, resolve_source

SATISFIED: Mapping[str, str] = {
    "trust_remote_code": "no code of a checkpoint runs, whether it is trusted or not",
    "code_revision": "the same",
    "empty_init": "weights never get random values before they are read",
    "low_cpu_mem_usage": "weights are read once, to where they will lie",
    "resume_download": "downloads go on where they stopped",
    "use_safetensors": "safetensors are read where a checkpoint has them, else its other files",
    "use_fast": "there is one tokenizer for every release",
    "offload_folder": "nothing is put on disk",
    "offload_state_dict": "the same",
}
"""Argument → why every value of it is satisfied already."""
DOWNLOAD = ("revision", "cache_dir", "force_download", "local_files_only", "token")
"""Arguments of the hub's download."""
QUANTIZED = {"load_in_8bit": "int8", "load_in_4bit": "int4-g64"}
"""bitsandbytes' arguments → our method of as many bits, which runs on every device."""
INSTEAD: Mapping[str, str] = {
    "quantization_config": "Write `quantization='int4-g64'`, or `'nf4'` for what bitsandbytes does.",
    "pre_seq_len": "The prefix knows its length: write `glmtune.load_model(source, prefix=FOLDER)`.",
    "prefix_projection": "The prefix knows its form: write `glmtune.load_model(source, prefix=FOLDER)`.",
    "quantization_bit": "Write `quantization='int4'` or `'int8'`; a quantized checkpoint needs neither.",
    "use_flash_attention_2": "Write `attn_implementation='sdpa'`: PyTorch has the kernel.",
    "use_auth_token": "Write `token=`.",
    "proxies": "Set the environment variable HTTPS_PROXY.",
    "mirror": "Set the environment variable HF_ENDPOINT.",
    "subfolder": "Give the folder itself.",
    "from_tf": "The releases have PyTorch weights only; leave it out.",
    "from_flax": "The releases have PyTorch weights only; leave it out.",
    "state_dict": "Load the model, then call `model.load_state_dict(...)`.",
    "offload_buffers": "Nothing is put on the CPU or on disk: write `quantization='int4'`.",
    "output_loading_info": "Missing and leftover weights are errors; leave it out.",
    "ignore_mismatched_sizes": "Weights of another shape are errors; leave it out.",
    "attention_dropout": "The releases have no dropout; leave it out.",
}
"""Argument → what to write."""
VALID = ("dtype", "device", "device_map", "max_memory", "quantization", "prefix", "adapter", "family")
"""Arguments of `load_model`, for the message about an unknown one."""


def check_typed(
    source: str | Path, options: Mapping[str, Any], typed: Mapping[str, object]
) -> tuple[str | Path, dict[str, Any]]:
    """Turn arguments of ``from_pretrained`` into those of `glmtune.loading.load_base`.

    Args:
        source: a preset name, hub id or folder.
        options: of `load_base`.
        typed: what else the user wrote.

    Returns:
        The source (a folder, if the download had arguments) and the options.

    Raises:
        ConfigError: an argument that cannot be obeyed, with what to write; one that does not exist; two that
            say the same.
        CheckpointError: a download failed.
    """
    given = {name: value for name, value in typed.items() if value is not None and not name.startswith("_")}
    found = dict(options)
    for name in SATISFIED:
        given.pop(name, None)
    if "num_gpus" in given:
        found["num_gpus"] = given.pop("num_gpus")
    if "torch_dtype" in given:
        _put(found, "dtype", given.pop("torch_dtype"), "torch_dtype")
    for name, method in QUANTIZED.items():
        if given.pop(name, False):
            _put(found, "quantization", method, name)
    source, family = fetch_typed(source, given)
    if family is not None and found.get("family") is None:
        found["family"] = family
    refuse_typed(given, VALID)
    return source, found


def fetch_typed(source: str | Path, given: dict[str, object]) -> tuple[str | Path, Any]:
    """Download as a user says (`DOWNLOAD`).

    Args:
        source: a preset name, hub id or folder.
        given: arguments; those of the download are taken out.

    Returns:
        The folder, and the family that the source's name tells; or the source as it is, and None, where
        nothing was said of a download.

    Raises:
        ConfigError: a revision of a folder, or of ModelScope's.
        CheckpointError: the download failed.
    """
    asked = {name: given.pop(name) for name in DOWNLOAD if name in given}
    asked = {name: value for name, value in asked.items() if value is not None and value is not False}
    if asked.get("revision") == "main":
        del asked["revision"]
    if not asked:
        return source, None
    if is_downloaded(source):
        return resolve_source(source, asked), family_of_source(source)
    if "revision" in asked:
        raise ConfigError(
            f"`revision` is `{asked['revision']}`, but `{source}` is not a model on the hub, so it has none. "
            "Leave `revision` out, or download that revision and give its folder."
        )
    return source, None  # a folder: there is nothing to download, whatever was said of it


def refuse_typed(given: Mapping[str, object], valid: tuple[str, ...]) -> None:
    """Refuse what is left of a user's arguments.

    Args:
        given: arguments that nothing has taken.
        valid: names that there are.

    Raises:
        ConfigError: there is one, with what to write instead where that is known.
    """
    for name, value in given.items():
        if name in INSTEAD:
            raise ConfigError(f"`{name}={str(value)[:60]}` is not an argument here. {INSTEAD[name]}")
        raise ConfigError(unknown_name("An argument", name, [*valid, "torch_dtype", *QUANTIZED]))


def _put(found: dict[str, Any], name: str, value: object, written: str) -> None:
    if found.get(name) not in (None, value):
        raise ConfigError(
            f"`{written}` asks for {name} `{value}`, but `{name}` is `{found[name]}` already. Give one of "
            "them."
        )
    found[name] = value
