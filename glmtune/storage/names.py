"""Names of files and folders that every file system takes, made of what users call models and data sets."""

from __future__ import annotations

import re

_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]+')
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(?=\.|$)", re.IGNORECASE)


def last_part(source: str) -> str:
    r"""Return what a path or an id of a hub calls the thing itself, however its parts are divided.

    Not left to `pathlib`: an id has slashes on Windows, too, and a run's record may be read on another system
    than the one that wrote it.

    Args:
        source: a path of any system, or an id.

    >>> [last_part(name) for name in ("THUDM/chatglm2-6b", r"D:\models\my glm", "modelscope:chatglm2-6b")]
    ['chatglm2-6b', 'my glm', 'chatglm2-6b']
    """
    return re.split(r"[/\\:]", source.rstrip("/\\"))[-1]


def portable_name(text: str) -> str:
    r"""Return a name for a file or folder that Windows, macOS and Linux all take.

    Windows allows no ``<>:"/\|?*``, no dot or blank at the end, and none of the names of its old devices; a
    colon would not even be refused, but write to a hidden part of another file.

    Args:
        text: any.

    >>> portable_name("chatglm2-6b"), portable_name("a:b?"), portable_name("aux.v1. "), portable_name("..")
    ('chatglm2-6b', 'a-b-', '_aux.v1', 'unnamed')
    """
    name = _FORBIDDEN.sub("-", text).rstrip(". ")
    return _DEVICES.sub(r"_\1", name, count=1) if _DEVICES.match(name) else name or "unnamed"
