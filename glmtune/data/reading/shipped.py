"""Find the data files that come with glmtune, in a source tree and in an installed package alike."""

from __future__ import annotations

from pathlib import Path

from glmtune.errors import DataError

PREFIX = "shipped:"
_PACKAGE = Path(__file__).resolve().parents[2]


def shipped_folder() -> Path:
    """Return the folder of the shipped data sets (``glmtune/_data`` if installed, else ``data`` of the tree).

    Raises:
        DataError: neither exists; the installation is incomplete.
    """
    candidates = (_PACKAGE / "_data", _PACKAGE.parent / "data")
    for folder in candidates:
        if folder.is_dir():
            return folder
    looked = " and ".join(str(folder) for folder in candidates)
    raise DataError(f"the shipped data sets are absent: looked for {looked}. Install glmtune again.")


def resolve_shipped(name: str) -> Path:
    """Return the file behind ``shipped:ads/train.jsonl``.

    Args:
        name: the name, with or without the prefix ``shipped:``.

    Returns:
        The existing file.

    Raises:
        DataError: there is no such file; those that exist are listed.
    """
    folder = shipped_folder()
    path = folder / name.removeprefix(PREFIX)
    if path.is_file():
        return path
    files = sorted(str(file.relative_to(folder)) for file in folder.glob("*/*.json*"))
    exist = f"Shipped files: {', '.join(files)}." if files else f"No data set is in {folder}."
    raise DataError(f"`{name}` is no shipped data file. {exist}")
