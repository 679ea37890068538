"""Find the files of a split: given paths, shipped data sets, and named data sets in their usual folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from glmtune.data.reading.readers import is_hub_id, nearest_files
from glmtune.data.reading.shipped import PREFIX, resolve_shipped
from glmtune.data.settings import SPLITS, DataSettings
from glmtune.errors import ConfigError, DataError, unknown_name

ENVIRONMENT_VARIABLE = "GLMTUNE_DATA"


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


def find_data_file(settings: DataSettings, split: str) -> str:
    """Return the file or hub id of a split.

    Args:
        settings: the data settings.
        split: ``train``, ``validation`` or ``test``; ``test`` falls back on the validation file.

    Returns:
        A path that exists, or a hub id.

    Raises:
        ConfigError: no file is given for the split, or ``data.name`` or the split does not exist.
        DataError: the file is nowhere; every place looked at is listed.
    """
    if split not in SPLITS:
        raise ConfigError(unknown_name("Split", split, SPLITS))
    if settings.name != "files" and settings.name not in NAMED_SETS:
        raise ConfigError(unknown_name("`data.name`", settings.name, ["files", *NAMED_SETS]))
    given = settings.file_of(split) or (settings.validation_file if split == "test" else None)
    if not given:
        raise ConfigError(
            f"`data.{split}_file` is not set, but the {split} rows are needed. Give a file with"
            f" `data.{split}_file=FILE`, or choose a data set, such as `data=ads`."
        )
    if given.startswith(PREFIX):
        return str(resolve_shipped(given))
    candidates = _candidates(settings, Path(given).expanduser())
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    if settings.name == "files" and settings.dir is None and is_hub_id(given):
        return given
    raise _absent(settings, split, given, candidates)


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
    if len(candidates) == 1:
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
