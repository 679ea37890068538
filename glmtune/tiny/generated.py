"""Data files that are made when asked for: ``generated:glm-tiny/train/170000`` names rows of the corpus."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from glmtune.errors import ConfigError
from glmtune.storage.files import sync
from glmtune.storage.renames import replace
from glmtune.tiny.corpus.mix import write

PREFIX = "generated:"
FOLDER = Path("runs") / "generated"
SALTS = ("train", "validation")
CORPUS_SEED = 0


def resolve_generated(name: str | list[str] | None) -> str | list[str] | None:
    """Turn a name of generated rows into a file; leave any other name alone.

    The file lies under ``runs/generated`` and is made once per state of this package's sources.

    Args:
        name: what ``data.train_file`` or ``data.validation_file`` holds.

    Returns:
        The path of the JSONL file, or ``name`` itself; of a list, those of its names.

    Raises:
        ConfigError: the name has not the form ``generated:glm-tiny/SALT/ROWS``.
    """
    if isinstance(name, list):
        return [_resolved(item) for item in name]
    return None if name is None else _resolved(name)


def _resolved(name: str) -> str:
    if not name.startswith(PREFIX):
        return name
    parts = name.removeprefix(PREFIX).split("/")
    if len(parts) != 3 or parts[0] != "glm-tiny" or parts[1] not in SALTS or not parts[2].isdigit():
        raise ConfigError(
            f"`{name}` names no generated rows: it must be `generated:glm-tiny/train/ROWS` or "
            "`generated:glm-tiny/validation/ROWS`, such as `generated:glm-tiny/train/1000`."
        )
    path = FOLDER / f"glm-tiny-{parts[1]}-{parts[2]}-{source_hash()[:12]}.jsonl"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        write(unfinished, seed=CORPUS_SEED, count=int(parts[2]), salt=parts[1])
        sync(unfinished)
        replace(unfinished, path)
    return str(path)


def source_hash() -> str:
    """Return a sha256 over the modules and word lists of ``corpus/``, which decide every row."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent / "corpus"
    for path in sorted([*folder.glob("*.py"), *folder.glob("lexicon/*.yaml")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
