"""Find the files of a split: given paths, shipped data sets, and named data sets in their usual folders.

A setting may name several: a list, a pattern (``parts/*.jsonl``), a folder, a zip archive. Files found so
come in the order of their names, whatever the file system says, so that the same files are the same data.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from glmtune.data.reading.archives import ZIP, archive_of, data_suffix, members
from glmtune.data.reading.readers import TEXT_SUFFIXES, is_hub_id, nearest_files
from glmtune.data.reading.shipped import PREFIX, resolve_shipped
from glmtune.data.settings import SPLITS, DataSettings
from glmtune.errors import ConfigError, DataError, unknown_name

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "GLMTUNE_DATA"
MAX_FILES = 10_000
_SHOWN_NAMES = 10
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "valid", "validation", "val", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What tells in a file's name which split it holds; a folder of several splits is not one of them."""


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A public data set that users download themselves.

    Attributes:
        folders: names its folder usually has.
        where_to_get: one sentence for users who do not have it.
    """

    folders: tuple[str, ...]
    where_to_get: str


NAMED_SETS = {
    "adgen": NamedSet(
        folders=("adgen", "AdvertiseGen"),
        where_to_get=(
            "ADGEN is not part of glmtune: get AdvertiseGen.tar.gz as the ChatGLM2-6B repository describes"
            " under `ptuning` (github.com/THUDM/ChatGLM2-6B), unpack it here, and it is found as"
            " AdvertiseGen/train.json and AdvertiseGen/dev.json (fields content, summary)."
        ),
    ),
}


def find_data_files(settings: DataSettings, split: str) -> tuple[str, ...]:
    """Return the files and hub ids of a split, in the order they are read in.

    Args:
        settings: the data settings.
        split: ``train``, ``validation`` or ``test``; ``test`` falls back on the validation rows.

    Returns:
        At least one path that exists (``rows.zip/train.jsonl`` for a file in an archive), or hub id.

    Raises:
        ConfigError: no file is given for the split, a file is named twice, or ``data.name`` or the split does
            not exist.
        DataError: a file is nowhere (every place looked at is listed), a pattern or folder has none, or a
            folder holds several splits.
    """
    given = _given(settings, split)
    names = [given] if isinstance(given, str) else given
    files = [file for name in names for file in _expanded(find_data_file(settings, split, name), split)]
    twice = next((file for place, file in enumerate(files) if file in files[:place]), None)
    if twice is not None:
        raise ConfigError(
            f"`data.{split}_file` names `{twice}` twice, so its rows would count twice. Name it once."
        )
    if len(files) > MAX_FILES:
        raise ConfigError(
            f"`data.{split}_file` names {len(files)} files, more than {MAX_FILES}, the most that are read."
            " Join them."
        )
    if len(files) > 1:
        logger.info("%s rows are read from %d files: %s", split, len(files), _some(files))
    return tuple(files)


def find_data_file(settings: DataSettings, split: str, given: str | None = None) -> str:
    """Return the file, folder, pattern or hub id that one name means.

    Args:
        settings: the data settings.
        split: ``train``, ``validation`` or ``test``.
        given: the name; None takes the setting, which must be one name.

    Returns:
        A path that exists, a pattern that some file fits, or a hub id.

    Raises:
        ConfigError: see `find_data_files`; so is DataError.
    """
    name = _given(settings, split) if given is None else given
    assert isinstance(name, str), "a list has as many places as names"
    if name.startswith(PREFIX):
        return str(resolve_shipped(name))
    candidates = _candidates(settings, Path(name).expanduser())
    for candidate in candidates:
        if candidate.exists() or archive_of(candidate) is not None or _matches(candidate):
            return str(candidate)
    if settings.name == "files" and settings.dir is None and is_hub_id(name):
        return name
    raise _absent(settings, split, name, candidates)


def described_files(files: Iterable[str]) -> str:
    """Name files in one short line: the file, or the first one and how many more.

    >>> described_files(["a.jsonl", "b.jsonl", "c.jsonl"])
    'a.jsonl and 2 more files'
    """
    first, *rest = files
    return first if not rest else f"{first} and {len(rest)} more file{'s' if len(rest) > 1 else ''}"


def size_of(source: str) -> int:
    """Return the bytes of a data file, of an archive for its members; 0 for a data set of the hub."""
    path = Path(source)
    file = archive_of(path) or path
    try:
        return file.stat().st_size
    except OSError:
        return 0  # reading it says better what is wrong


def _given(settings: DataSettings, split: str) -> str | list[str]:
    if split not in SPLITS:
        raise ConfigError(unknown_name("Split", split, SPLITS))
    if settings.name != "files" and settings.name not in NAMED_SETS:
        raise ConfigError(unknown_name("`data.name`", settings.name, ["files", *NAMED_SETS]))
    given = settings.file_of(split) or (settings.file_of("validation") if split == "test" else None)
    if not given:
        raise ConfigError(
            f"`data.{split}_file` is not set, but the {split} rows are needed. Give a file with"
            f" `data.{split}_file=FILE`, or choose a data set, such as `data=ads`."
        )
    return given


def _matches(path: Path) -> list[str]:
    """Return the files that a pattern fits, by name; none where the path is no pattern."""
    if not glob.has_magic(str(path)):
        return []
    return sorted(found for found in glob.glob(str(path), recursive=True) if Path(found).is_file())


def _expanded(source: str, split: str) -> list[str]:
    """Return the data files that a source stands for; a file or hub id stands for itself."""
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, split)
    if path.suffix.lower() == ZIP and path.is_file():
        return _of_archive(path, split)
    found = [] if path.exists() else _matches(path)
    return [file for match in found for file in _expanded(match, split)] or [source]


def _of_folder(folder: Path, split: str) -> list[str]:
    files = sorted(file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    wanted = [name for name in files if data_suffix(Path(name)) in (*TEXT_SUFFIXES, ".parquet", ZIP)]
    chosen = _of_one_split(folder, wanted, [name for name in files if name not in wanted], split)
    return [file for name in chosen for file in _expanded(str(folder / name), split)]


def _of_archive(archive: Path, split: str) -> list[str]:
    files = members(archive)
    wanted = [name for name in files if data_suffix(Path(name)) in TEXT_SUFFIXES]
    chosen = _of_one_split(archive, wanted, [name for name in files if name not in wanted], split)
    return [str(archive / name) for name in chosen]


def _of_one_split(place: Path, files: list[str], others: list[str], split: str) -> list[str]:
    """Refuse a folder or archive without data files, or with those of several splits."""
    if not files:
        held = f" It holds: {_some(others)}." if others else " It is empty."
        raise DataError(
            f"there is no data file in it (`data.{split}_file`).{held} Data files end in"
            f" {', '.join(TEXT_SUFFIXES)} (also with .gz behind it), or, in folders, .parquet and .zip.",
            path=place,
        )
    splits = {name: _SPLIT_WORDS[word] for name in files for word in _words(name) if word in _SPLIT_WORDS}
    if len(set(splits.values())) > 1:
        own = next((name for name, found in splits.items() if found == split), next(iter(splits)))
        raise DataError(
            f"it holds the files of several splits: {_some(files)}. Name those that are meant, such as"
            f" `data.{split}_file={place / own}`.",
            path=place,
        )
    if others:
        logger.warning("%s: not read, as they are no data files by their names: %s", place, _some(others))
    return files


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", name.lower())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def _candidates(settings: DataSettings, given: Path) -> list[Path]:
    if given.is_absolute():
        return [given]
    if settings.dir is not None:
        return [Path(settings.dir).expanduser() / given]
    if settings.name == "files" or given.parent != Path("."):
        return [given]
    roots = [Path(root).expanduser() for root in (os.environ.get(ENVIRONMENT_VARIABLE),) if root]
    roots += [Path("data"), Path(".")]
    return [root / folder / given for root in roots for folder in NAMED_SETS[settings.name].folders]


def _absent(settings: DataSettings, split: str, given: str, candidates: list[Path]) -> DataError:
    parts = [part.strip() for part in given.split(",")]
    if len(parts) > 1 and all(_candidates(settings, Path(part).expanduser())[0].exists() for part in parts):
        return DataError(
            f"there is no such file. Several are written as a list: `data.{split}_file=[{','.join(parts)}]`.",
            path=given,
        )
    if len(candidates) == 1:
        if glob.has_magic(given):
            return DataError(f"no file fits this pattern (`data.{split}_file`).", path=candidates[0])
        where = "" if settings.name == "files" else f" {NAMED_SETS[settings.name].where_to_get}"
        message = f"there is no such file (`data.{split}_file`).{nearest_files(candidates[0])}{where}"
        return DataError(message, path=candidates[0])
    named = NAMED_SETS[settings.name]
    looked = "\n".join(f"  {candidate}" for candidate in candidates)
    return DataError(
        f"data={settings.name}: the file `{given}` (`data.{split}_file`) was found in none of these places:\n"
        f"{looked}\n{named.where_to_get}\nIf it is elsewhere: `data.dir=FOLDER`, or set the environment"
        f" variable {ENVIRONMENT_VARIABLE} to the folder that holds {' or '.join(named.folders)}."
    )
