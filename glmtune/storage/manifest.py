"""Manifests: the file in a folder that lists all others with size and checksum, so that damage has a name.

    {..., "files": {"model.safetensors": 5040}, "format": 2, "checksums": {"model.safetensors": "9f..."},
     "checksum": "..."}

`files` and the facts beside it are as in format 1, which had no checksums and is still accepted; so an older
glmtune reads a newer folder, too. The last key is the checksum of the manifest itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from glmtune.errors import CheckpointError
from glmtune.storage.checksums import KEY, checked_json, file_checksum, json_with_checksum
from glmtune.storage.files import write_json

MANIFEST = "checkpoint.json"
FORMAT = 2
OWN_KEYS = frozenset({"format", "checksums", KEY})


def write_manifest(folder: Path, facts: Mapping[str, Any], known: Mapping[str, str] | None = None) -> None:
    """List every file of a folder.

    Args:
        folder: filled; files in its sub-folders are listed, too.
        facts: plain values kept beside the list.
        known: checksums of files that were computed before, by name; the others are read once.

    Raises:
        OSError: a file cannot be read, or the manifest not be written.
    """
    known = known or {}
    found = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    found.pop(MANIFEST, None)
    sizes = {name: path.stat().st_size for name, path in found.items()}
    checksums = {name: known.get(name) or file_checksum(path) for name, path in found.items()}
    values = {**facts, "files": sizes, "format": FORMAT, "checksums": checksums}
    write_json(folder / MANIFEST, json_with_checksum(values))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return what a folder's manifest says; None if there is none.

    Raises:
        OSError: it is there, but cannot be read.
        ValueError: it is damaged.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    values = checked_json(text)
    # `checked_json` passes what has no checksum, as format 1 had none; format 2 cannot have lost it.
    if "format" in values and f'"{KEY}"' not in text:
        raise ValueError(f"it has no `{KEY}`")
    sizes, checksums = values.get("files"), values.get("checksums", {})
    if (
        not isinstance(sizes, dict)
        or not isinstance(checksums, dict)
        or values.get("format", 1) not in (1, FORMAT)
    ):
        raise ValueError("it lists no files in a way that is known")
    for name, size in sizes.items():
        path = PurePosixPath(name)
        # The list decides which files are read, so it may not lead out of its folder.
        if path.is_absolute() or ".." in path.parts or not isinstance(size, int):
            raise ValueError(f"it lists `{name}`, which is no file of this folder")
    return values


def facts_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest says without what is there for checking."""
    return {name: value for name, value in manifest.items() if name not in OWN_KEYS}


def damage_of(
    folder: Path, manifest: Mapping[str, Any], names: Iterable[str] | None = None, *, contents: bool = True
) -> str | None:
    """Say what of a folder is not what its manifest lists.

    Args:
        folder: the folder.
        manifest: as read.
        names: files to look at; those not listed are passed over. None: all that are listed.
        contents: compare checksums, too, which reads the files.

    Returns:
        The first damage, in words; None: there is none.

    Raises:
        OSError: a file is there, but cannot be read.
    """
    sizes, checksums = manifest["files"], manifest.get("checksums", {})
    listed = [name for name in (sizes if names is None else names) if name in sizes]
    for name in listed:
        try:
            size = (folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        if size != sizes[name]:
            return f"{name} has {size:,} bytes, not {sizes[name]:,}"
    for name in listed if contents else ():
        if name in checksums and file_checksum(folder / name) != checksums[name]:
            return f"{name} is damaged: its checksum is not the one it was written with"
    return None


def check_files(folder: Path, names: Iterable[str] | None = None) -> None:
    """Make sure that files are as they were written, where a manifest beside them tells.

    Args:
        folder: of glmtune or of anybody.
        names: files that are about to be loaded; None: all that are listed.

    Raises:
        CheckpointError: one is damaged, or cannot be read; which one is said.
    """
    try:
        manifest = read_manifest(folder)
        damage = None if manifest is None else damage_of(folder, manifest, names)
    except ValueError as error:
        damage = f"{MANIFEST} is damaged: {error}"
    except OSError as error:
        place = error.filename or folder / MANIFEST
        raise CheckpointError(
            f"`{place}` cannot be read ({error.strerror or error}), so what is in `{folder}` "
            "cannot be checked. Make it readable, or name another folder."
        ) from error
    if damage is not None:
        raise CheckpointError(
            f"`{folder}` is not as it was written: {damage}. Use another checkpoint of the run, or a copy "
            f"that is whole. (Whoever changed it on purpose removes {MANIFEST}.)"
        )
