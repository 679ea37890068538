"""By which command and software a result came about: for readers, it decides nothing."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from glmtune.version import __version__

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "sentencepiece", "vllm")
_NAMES = ("glmtune", "glmtune.exe", "__main__.py", "-m")
_SECRETS = re.compile(r"(://)[^/@\s]+@|((?i:[?&][^=&\s]*(?:key|token|secret)[^=&\s]*=))[^&\s']+")


def environment(device: str = "", clean: Callable[[str], str] = str) -> dict[str, Any]:
    """Describe command, software and machine; nothing in it depends on the clock.

    Args:
        device: what computed, as far as this process knows.
        clean: makes secrets of the command unreadable that only the backend knows.
    """
    return {
        "glmtune": __version__,
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name))),
        "platform": platform.platform(),
        "device": device,
        "command": clean(typed_command()),
    }


def typed_command() -> str:
    """Return the command of this process as it can be typed again, without the secrets of an address."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    words = ["glmtune" if name in _NAMES else name, *sys.argv[1:]]
    return _SECRETS.sub(r"\1\2***", shlex.join(words))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
