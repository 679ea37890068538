"""The folder in which encoded rows stay, a folder of its own for every key.

    ~/.cache/glmtune/rows/KEY/      data.cache_dir, else `rows` in $GLMTUNE_CACHE
        rows.arrow  *.npy           Arrow's stream format and plain arrays: reading them runs nothing
        meta.json                   written last: what is said of the rows, and the size of each file

It is filled under another name, on disk before it takes its own, so a kill leaves nothing that is taken for
whole. One process fills it and others wait, also those of one run. It can be deleted at any time.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from glmtune.errors import ConfigError
from glmtune.storage.cache_place import cache_folder
from glmtune.storage.files import begin_folder, partial_of, put_in_place
from glmtune.storage.json_files import parse_json
from glmtune.storage.lock import LOCK_SUFFIX, Lock

logger = logging.getLogger(__name__)

META = "meta.json"
FORMAT = 1
"""Of the folder; a change of what is encoded is in the key."""
Kept = TypeVar("Kept")


class CacheError(ConfigError):
    """Encoded rows cannot be kept."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole folder of the cache.

    Attributes:
        folder: of the files.
        meta: what was said of them, plain values.
    """

    folder: Path
    meta: dict[str, Any]

    def array(self, name: str) -> np.ndarray:
        """Map an array into memory.

        Args:
            name: of the file, without ``.npy``.

        Raises:
            OSError: it is not there.
            ValueError: it is no plain array.
        """
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def cache_root(given: str | None) -> Path:
    """Return the folder of the cache.

    Args:
        given: ``data.cache_dir``.

    Raises:
        CacheError: none is given, and the user has no home folder.
    """
    try:
        return Path(given).expanduser().absolute() if given else cache_folder() / "rows"
    except OSError as error:
        raise _unwritable(Path("~/.cache"), error) from None


def keep(root: Path, key: str, fill: Callable[[Path], dict[str, Any]], read: Callable[[Entry], Kept]) -> Kept:
    """Return what the cache holds under a key, made first if it is not there.

    Args:
        root: of the cache.
        key: of the rows.
        fill: writes files into a folder, and returns what is to be said of them; its errors pass.
        read: takes them back; raises OSError, ValueError, KeyError or TypeError where they are damaged.

    Raises:
        CacheError: it cannot be written.
    """
    folder = root / key
    found = _read(folder, read)
    if found is None:
        try:
            # Rows are as private as the files they are of.
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(folder):
                found = _read(folder, read)  # by whoever was waited for
                if found is None:
                    _fill(folder, fill)
                    found = read(_opened(folder))
        except OSError as error:
            raise _unwritable(root, error) from error
    return found


def _locked(folder: Path) -> Lock:
    """Lock a folder of the cache, by a file beside it."""
    path = folder.with_name(f".{folder.name}{LOCK_SUFFIX}")
    return Lock(
        path, guards=folder, waits=True, unwritable=lambda _, error: _unwritable(folder.parent, error)
    )


def _unwritable(root: Path, error: OSError) -> CacheError:
    return CacheError(
        f"The encoded rows cannot be kept in {root}: {error.strerror or error}. Name another folder"
        " (`data.cache_dir=FOLDER`), or keep them in memory (`data.cache=never`)."
    )


def _read(folder: Path, read: Callable[[Entry], Kept]) -> Kept | None:
    """Read what is whole; None where nothing is, or it is damaged."""
    try:
        return read(_opened(folder))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s is damaged (%s): its rows are encoded anew.", folder, error)
        return None


def _opened(folder: Path) -> Entry:
    meta = parse_json((folder / META).read_bytes())
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{META} is of another format")
    for name, size in meta["files"].items():
        found = (folder / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes instead of {size}")
    return Entry(folder, meta)


def _fill(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    partial = begin_folder(folder)
    try:
        said = fill(partial)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        meta = {"format": FORMAT, "files": sizes, **said}
        # Escaped, so that text of any kind stays what it was: a row may hold half a surrogate pair.
        (partial / META).write_text(json.dumps(meta), encoding="utf-8")
        put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@dataclass(frozen=True, slots=True)
class Cleared:
    """What `clear` deleted.

    Attributes:
        num_sets: folders of rows.
        num_bytes: that they took.
    """

    num_sets: int
    num_bytes: int


def clear(root: Path) -> Cleared:
    """Delete all encoded rows; what else lies in the folder stays.

    Args:
        root: of the cache.

    Raises:
        OSError: something cannot be deleted.
    """
    num_sets = num_bytes = 0
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        is_entry = folder.is_dir() and _is_key(folder.name.removeprefix(".").split(".")[0])
        if is_entry and ((folder / META).is_file() or folder == partial_of(root / _stem(folder))):
            with _locked(root / _stem(folder)):
                num_bytes += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                num_sets += 1
                shutil.rmtree(folder)
    return Cleared(num_sets, num_bytes)


def _stem(folder: Path) -> str:
    return folder.name.removeprefix(".").split(".")[0]


def _is_key(name: str) -> bool:
    return len(name) == 32 and set(name) <= set("0123456789abcdef")
