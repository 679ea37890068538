"""Where benchmark data is found on this machine, and where the official files can be downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from glmtune.data.reading.shipped import shipped_folder
from glmtune.errors import ConfigError, DataError, unknown_name

DATA_VARIABLE = "GLMTUNE_DATA"
HUB = "hub"
SAMPLE = "sample"
SHIPPED_WHOLE = ("exam",)
"""Benchmarks of glmtune's own: nobody else has files of them."""
PARTS = {"ceval_hard": "ceval"}
"""Benchmarks that are asked from the files of another."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a download.

    Attributes:
        path: where it belongs inside the target folder.
        url: where it comes from.
        sha256: of its bytes, in hexadecimal; empty where no release pins them.
        unpack: whether it is a tar or zip archive whose members belong into the target folder.
    """

    path: str
    url: str
    sha256: str = ""
    unpack: bool = False


@dataclass(frozen=True, slots=True)
class Download:
    """The official files of one benchmark.

    Attributes:
        name: as in ``benchmark=NAME``.
        licence: of the data; to be shown before anything is downloaded.
        home: page of its publishers.
        files: what to fetch.
        notes: what else to know, maybe empty.
    """

    name: str
    licence: str
    home: str
    files: tuple[RemoteFile, ...]
    notes: str = ""


@cache
def downloads() -> Mapping[str, Download]:
    """Return what can be fetched, by benchmark name (from ``downloads.yaml`` beside this file)."""
    from glmtune.storage.yaml_text import read_yaml

    found: dict[str, Download] = {}
    for name, entry in read_yaml(Path(__file__).with_name("downloads.yaml")).items():
        files = tuple(
            RemoteFile(
                path=path,
                url=file.get("url") or entry["base"] + path,
                sha256=file.get("sha256", ""),
                unpack=file.get("unpack", False),
            )
            for path, file in entry["files"].items()
        )
        found[name] = Download(name, entry["licence"], entry["home"], files, entry.get("notes", ""))
    return found


def download_of(name: str) -> Download:
    """Return the download of a benchmark.

    Raises:
        ConfigError: there is none of that name (the valid ones are listed, nearest first), it ships whole, or
            it is part of another.
    """
    if name in PARTS:
        raise ConfigError(
            f"`{name}` is asked from the files of {PARTS[name]}. Fetch those: `glmtune data fetch"
            f" {PARTS[name]}`."
        )
    if name in SHIPPED_WHOLE:
        raise ConfigError(
            f"`{name}` comes with glmtune, so that there is nothing to fetch. Ask it with `glmtune eval"
            f" benchmark={name}`."
        )
    if name not in downloads():
        raise ConfigError(unknown_name("The name to fetch", name, downloads()))
    return downloads()[name]


def data_root() -> Path:
    """Return the folder that holds one folder per benchmark: ``GLMTUNE_DATA``, or else ``data`` here.

    Raises:
        ConfigError: ``GLMTUNE_DATA`` is set, but names no folder.
    """
    named = os.environ.get(DATA_VARIABLE)
    if named is None:
        return Path("data")
    root = Path(named).expanduser()
    if not root.is_dir():
        raise ConfigError(
            f"`{DATA_VARIABLE}` is `{named}`, but there is no such folder. Make it, or unset the variable."
        )
    return root


@dataclass(frozen=True, slots=True)
class Wanted:
    """A benchmark whose folder is looked for, and how it is recognised.

    Attributes:
        name: of the benchmark.
        folder_names: names its folder may have inside a folder of benchmarks.
        is_here: whether a folder holds it.
        fetch: downloads it from the Hugging Face hub into a folder and returns that.
    """

    name: str
    folder_names: Sequence[str]
    is_here: Callable[[Path], bool]
    fetch: Callable[[str, Path], Path]

    def inside(self, root: Path) -> Path | None:
        """Return the folder in (or at) a root that holds it, if there is one."""
        places = [root / folder for folder in self.folder_names]
        return next((place for place in (*places, root) if self.is_here(place)), None)


def find_folder(wanted: Wanted, data_dir: str | Path | None = None) -> Path:
    """Return the folder that holds a benchmark.

    Args:
        wanted: the benchmark.
        data_dir: its folder, or a folder with one per benchmark; ``hub`` downloads it from the Hugging Face
            hub; ``sample`` takes the small set shipped; None looks into ``GLMTUNE_DATA``, then ``./data``,
            and takes the shipped set last.

    Raises:
        ConfigError: ``GLMTUNE_DATA`` names no folder, or the hub is asked for what only ships.
        DataError: it is not where it was said to be, or nowhere.
    """
    if data_dir == HUB:
        if wanted.name in SHIPPED_WHOLE:
            raise ConfigError(
                f"`benchmark.data_dir` is `hub`, but {wanted.name} comes with glmtune and is not on the hub."
                " Leave `benchmark.data_dir` out."
            )
        return wanted.fetch(wanted.name, data_root() / wanted.folder_names[0])
    if data_dir == SAMPLE:
        return _shipped(wanted)
    if data_dir is not None:
        return _given(wanted, Path(data_dir).expanduser())
    # $GLMTUNE_DATA may hold some benchmarks only; then ./data is looked into as well.
    return wanted.inside(data_root()) or wanted.inside(Path("data")) or _shipped(wanted)


def _given(wanted: Wanted, root: Path) -> Path:
    name = wanted.name
    if not root.is_dir():
        raise DataError(
            f"`benchmark.data_dir` is `{root}`, but there is no such folder. Fetch the data with"
            f" `glmtune data fetch {name}`, or leave `benchmark.data_dir` out to use the small set shipped."
        )
    found = wanted.inside(root)
    if found is None:
        inside = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise DataError(
            f"`benchmark.data_dir` is `{root}`, but the files of {name} are neither there nor in a folder"
            f" {' or '.join(wanted.folder_names)} of it (it holds: {inside}). Give the folder with the"
            f" official layout, or fetch it with `glmtune data fetch {name}`."
        )
    return found


def _shipped(wanted: Wanted) -> Path:
    # `exam` ships whole, the others as small sets of their layout.
    folders = [shipped_folder() / f"{wanted.name}{ending}" for ending in ("_sample", "")]
    folder = next((folder for folder in folders if wanted.is_here(folder)), None)
    if folder is None:
        raise DataError(
            f"the data of {wanted.name} is nowhere: not in {DATA_VARIABLE}, not in ./data, and no sample of"
            f" it ships with glmtune. Fetch it with `glmtune data fetch {wanted.name}`, or give"
            " `benchmark.data_dir`."
        )
    return folder
