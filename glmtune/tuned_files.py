"""Saved prefixes and adapters: where a run leaves them, and whether they belong to the base at hand.

What a prefix or an adapter learnt means something only in the model it was trained in. Two bases with the
same numbers of layers and heads take each other's files without complaint and answer nonsense, so a file
names its base by fingerprint, and loading compares.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from glmtune.errors import CheckpointError
from glmtune.storage.files import put_back
from glmtune.storage.manifest import check_files

LOGGER = logging.getLogger(__name__)

ADAPTER_CONFIG, PREFIX_FILE, MODEL_CONFIG = "adapter_config.json", "prefix_encoder.safetensors", "config.json"
_TELLING = {
    ADAPTER_CONFIG: ("adapter", "a LoRA adapter", "adapter_path"),
    PREFIX_FILE: ("prefix", "a prefix", "prefix_path"),
    MODEL_CONFIG: ("model", "a model", "model.source"),
}
"""File that tells what a folder holds: the word of `load_model`, the words of people, the setting."""


@runtime_checkable
class IdentifiedBase(Protocol):
    """A base model that knows its identity; plain models of transformers do not, and are not checked.

    Attributes:
        source: what the user named.
    """

    source: str

    @property
    def parent_is_unknown(self) -> bool:
        """Whether the weights are codes and nothing tells of which weights."""
        ...

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that stand for architecture and weights."""
        ...

    def is_base(self, fingerprint: str) -> bool:
        """Say whether something trained on the base of this fingerprint fits this one."""
        ...


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """The base that a file says it was trained on.

    Attributes:
        fingerprint: of that base; empty where the file does not tell (official files, foreign adapters).
        source: what that base was called; may be empty.
    """

    fingerprint: str
    source: str


def find_tuned(
    path: str | Path, *alternatives: tuple[str, ...], what: str, absent: str, or_give: str = ""
) -> Path:
    """Find the files of something tuned.

    Args:
        path: a folder that holds them, or a run folder: then its ``last``, else its newest ``checkpoint-N``.
        alternatives: names of files that belong together, the preferred ones first.
        what: what is looked for, for the error.
        absent: what of it is not there, for the error.
        or_give: what else could be given, for the error.

    Returns:
        The first file of the first alternative that is there as a whole.

    Raises:
        CheckpointError: nothing there, with the places looked at; or a file is not as our run wrote it.
    """
    place = Path(path).expanduser()
    put_back(place)
    for folder in _folders(place):
        for names in alternatives:
            if all((folder / name).is_file() for name in names):
                check_files(folder, names)
                return folder / names[0]
    raise CheckpointError(
        f"No {what} at `{place}`: there is no {absent} in it, in its `last` or in its checkpoint-N folders"
        f"{'' if place.exists() else ' (the path does not exist)'}. "
        f"{found_instead(place, what)}"
        f"Give the run folder or one of its checkpoints{or_give}."
    )


def found_instead(place: Path, wanted: str) -> str:
    """Say what a folder holds in the place of what was looked for, and the words that load it.

    Args:
        place: a run folder, one of its checkpoints, or any other.
        wanted: ``adapter``, ``prefix`` or ``model``.

    Returns:
        A sentence with a blank behind it; empty where nothing is found either.
    """
    for folder in _folders(place):
        for name, (kind, what, setting) in _TELLING.items():
            if not (folder / name).is_file():
                continue
            if kind == "model":
                words = f"`load_model({str(folder)!r})`, or `model.source={folder}`"
            else:
                words = f"`load_model(BASE, {kind}={str(place)!r})`, or `model.source=BASE {setting}={place}`"
            # A model has its config.json; whoever wanted one and was sent away looked elsewhere.
            if kind != wanted or folder != place:
                return f"It holds {what} ({folder / name}), which {words} loads. "
    return ""


def _folders(place: Path) -> Iterator[Path]:
    """Yield the places of a run folder; ``best`` is none of them, as who wants it names it."""
    yield place
    yield place / "last"  # absent in a run that was killed before its first save was complete
    # In ASCII and bounded: to Python "²" is a digit, too, and no step has 5,000 of them.
    matches = ((re.fullmatch(r"checkpoint-([0-9]{1,18})", folder.name), folder) for folder in _listed(place))
    numbered = [(int(match[1]), folder) for match, folder in matches if match]
    yield from (folder for _, folder in sorted(numbered, reverse=True))  # by number: 100 comes after 9


def _listed(place: Path) -> Iterator[Path]:
    return place.iterdir() if place.is_dir() else iter(())


def check_same_base(
    what: str, trained_on: TrainedOn, model: object, *, may_belong: Callable[[], bool]
) -> None:
    """Refuse something that was trained on other weights.

    The same weights in another float type, or quantized by glmtune, are the same base. Released INT8 and INT4
    files do not tell which weights they were made from: a warning must do.

    Args:
        what: the prefix or adapter, for the message.
        trained_on: what it says.
        model: the base.
        may_belong: asked only for such released files: whether at least the release line is the same.

    Raises:
        CheckpointError: another base.
    """
    if not trained_on.fingerprint or not isinstance(model, IdentifiedBase):
        return
    if model.is_base(trained_on.fingerprint):
        return
    if model.parent_is_unknown and may_belong():
        LOGGER.warning(
            "The %s was trained on `%s`; `%s` is quantized and does not say from which weights, so whether "
            "they belong together cannot be checked.",
            what, trained_on.source, model.source,
        )  # fmt: skip
        return
    raise CheckpointError(
        f"The {what} was trained on another base: `{trained_on.source}` with fingerprint "
        f"{trained_on.fingerprint[:16]}, but the model `{model.source}` has {model.fingerprint()[:16]}. Load "
        "that base, or (in Python) pass `check_base=False` to use it all the same."
    ).see("another-base")
