"""What the Auto classes of transformers return for an official release (`auto_classes` calls these)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from glmtune.compat.arguments import SATISFIED, fetch_typed, refuse_typed
from glmtune.errors import ConfigError
from glmtune.loading import load_model, load_tokenizer
from glmtune.models.load import GlmModel, load_config
from glmtune.models.releases.source import resolve_source

IN_THE_FILES = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")
"""Of a configuration: what says nothing about the model it asks for."""


def auto_model(source: Any, *args: Any, config: Any = None, **typed: Any) -> GlmModel:
    """Load a model as ``AutoModel.from_pretrained`` does: on the CPU and in its own type, unless told.

    `glmtune.load_model` would choose both; here ``.half().cuda()`` or ``.float()`` follows, as the READMEs of
    the releases write it, and weights rounded to another type first would come out different.

    Args:
        source: preset name, hub id or folder.
        *args: none.
        config: as `auto_config` gave it.
        **typed: see `glmtune.loading.load_model`.

    Raises:
        ConfigError: arguments that cannot be obeyed, with what to write instead; see `load_model`.
    """
    _refuse_positional(args)
    for name in ("adapter_kwargs", "framework"):  # of transformers' own pipelines
        typed.pop(name, None)
    source, family = fetch_typed(source, typed)
    own = load_config(source, resolve_source(source), typed.get("family") or family)
    if config is not None:
        _check_unchanged(config, own)
    if not any(typed.get(name) not in (None, "auto") for name in ("dtype", "torch_dtype")):
        typed["dtype"] = own.dtype
        typed.pop("torch_dtype", None)
    if typed.get("device") is None and typed.get("device_map") is None:
        typed["device"] = "cpu"
    return load_model(source, **{"family": family, **typed})


def auto_tokenizer(source: Any, *args: Any, **typed: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer as ``AutoTokenizer.from_pretrained`` does; arguments as for `auto_model`.

    Raises:
        ConfigError: arguments that cannot be obeyed; padding on the right.
    """
    _refuse_positional(args)
    if typed.pop("padding_side", "left") != "left":
        raise ConfigError(
            "`padding_side` is given, but the releases pad on the left. Leave it out, or set "
            "`tokenizer.padding_side` afterwards."
        )
    given, family = _given(typed), typed.pop("family", None)
    given.pop("family", None)
    for name in ("config", "tokenizer_type"):
        given.pop(name, None)  # the files tell both
    source, known = fetch_typed(source, given)
    refuse_typed(given, ("family", "revision", "cache_dir", "padding_side"))
    return load_tokenizer(source, family=family or known)


def auto_config(source: Any, *args: Any, return_unused_kwargs: bool = False, **typed: Any) -> Any:
    """Read a configuration as ``AutoConfig.from_pretrained`` does, in native form.

    Raises:
        ConfigError: arguments that cannot be obeyed; a change to the configuration is one.
    """
    _refuse_positional(args)
    given = _given(typed)
    source, family = fetch_typed(source, given)
    config = load_config(source, resolve_source(source), given.pop("family", family))
    if return_unused_kwargs:
        return config, given
    refuse_typed(given, ("family", "revision", "cache_dir"))
    return config


def _given(typed: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that mean something."""
    return {
        name: value
        for name, value in typed.items()
        if value is not None and name not in SATISFIED and not name.startswith("_")
    }


def _refuse_positional(args: tuple[Any, ...]) -> None:
    if args:
        raise ConfigError(f"`from_pretrained` got {args[0]!r:.60} without a name. Write its name before it.")


def _check_unchanged(config: PretrainedConfig, own: PretrainedConfig) -> None:
    """Raise ConfigError for a configuration that is not that of the files: nothing of it would be obeyed."""
    given, stored = config.to_dict(), own.to_dict()
    for name in sorted({*given, *stored} - {*IN_THE_FILES}):
        if given.get(name) != stored.get(name):
            raise ConfigError(
                f"`config.{name}` is `{str(given.get(name))[:60]}`, but the checkpoint has "
                f"`{str(stored.get(name))[:60]}`, and a model is loaded as its files are. Leave `config` "
                "out; a tuned prefix comes by `glmtune.load_model(source, prefix=FOLDER)`."
            )
