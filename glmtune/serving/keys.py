"""Where API keys are read: a file or the environment. No message, log or setting ever holds one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from glmtune.errors import ConfigError

# What a header may hold, less blanks and the comma, which divides keys.
_KEY = re.compile(r"[!-+\--~]{1,512}")


def read_keys(setting: str, file: str | None, variable: str) -> list[str]:
    """Read keys from a file (one a line; blank ones and those with # in front are left out) and a variable.

    Args:
        setting: path of the setting that names the file.
        file: the file, if one is named.
        variable: of the environment; keys are divided by commas.

    Returns:
        All keys found; none where neither is given.

    Raises:
        ConfigError: one is given and holds no key, or one that no header can hold. Nobody is let in freely
            because a secret did not arrive.
    """
    keys: list[str] = []
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"`{setting}` is `{file}`, but it cannot be read ({error}). Name a text file, one key a line."
            ) from None
        numbered = [(f"line {number}", line.strip()) for number, line in enumerate(lines, 1)]
        found = [(place, line) for place, line in numbered if line and not line.startswith("#")]
        keys += _checked(found, f"`{setting}` is `{file}`")
    if variable in os.environ:
        parts = [part.strip() for part in os.environ[variable].split(",")]
        found = [(f"key {number}", part) for number, part in enumerate(parts, 1) if part]
        keys += _checked(found, f"`{variable}` of the environment is set")
    return keys


def _checked(found: list[tuple[str, str]], what: str) -> list[str]:
    if not found:
        raise ConfigError(f"{what}, but it holds no key. Add one, or leave it out: then nobody needs a key.")
    for place, key in found:
        if not _KEY.fullmatch(key):
            raise ConfigError(
                f"{what}, but its {place} is no key: a key has 1 to 512 ASCII characters, no blanks and no"
                " commas. Make one with `openssl rand -hex 32`."
            )
    return [key for _, key in found]
