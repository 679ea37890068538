"""The names under which clients ask for the base, and what they get who name nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glmtune.errors import ConfigError, unknown_name


def base_names(source: str, given: Sequence[str] | None, taken: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the base.

    Args:
        source: the model as the user named it.
        given: names chosen; None: that of the folder, preset or hub id, and the hub id.
        taken: names of adapters.

    Raises:
        ConfigError: a name is empty or an adapter's.
    """
    if given is not None:
        names = tuple(dict.fromkeys(given))
    else:
        place = Path(source).expanduser()
        short = (
            place.resolve().name if place.is_dir() else source.removeprefix("modelscope:").rpartition("/")[2]
        )
        is_id = not place.is_dir() and "/" in source
        names = (short, source) if is_id else (short,)
    if not names or not all(name.strip() for name in names):
        raise ConfigError("`model_names` is empty, but clients must be able to name the model. Leave it out.")
    for name in names:
        if name in taken:
            raise ConfigError(
                f"The base and an adapter are both called `{name}`. Name the adapter, such as"
                f" `prefix_path={{tuned:PATH}}`, or the base: `model_names=[NAME]`."
            )
    return names


def default_model(given: str | None, names: Sequence[str], adapters: Sequence[str]) -> str:
    """Return what answers where a request names no model.

    Args:
        given: what was chosen; None: the only adapter, as the official ``api.py`` answers with the prefix
            that it loaded; the base where there is none or several.
        names: of the base.
        adapters: names of the others.

    Raises:
        ConfigError: there is no model of that name.
    """
    if given is None:
        return adapters[0] if len(adapters) == 1 else names[0]
    if given not in (*names, *adapters):
        raise ConfigError(unknown_name("`answers.default_model`", given, [*names, *adapters]))
    return given
