"""What encoded rows are made of, as one key: content of the files, tokenizer, settings, and this code."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

from glmtune.data.conversations import SplitReader
from glmtune.data.reading.archives import archive_of
from glmtune.data.reading.readers import is_on_hub, load_hub, unreadable
from glmtune.data.settings import DataSettings
from glmtune.models.templates.renderer import TextTokenizer

NOT_IN_ROWS = frozenset(
    {"name", "dir", "train_file", "validation_file", "test_file", "validation_frac", "validation_seed"}
    | {"max_train_samples", "max_eval_samples", "max_predict_samples", "on_bad_row"}
    | {"packing", "packing_length", "pad_to_multiple_of", "cache", "cache_dir", "num_workers", "mix"}
)
"""Settings that decide no encoded row, or are in the key in other words. All others are, new ones too."""
_CODE = ("data", "models/templates", "models/tokenizers", "messages.py", "labels.py")
_PACKAGES = ("sentencepiece", "tokenizers", "transformers", "tiktoken", "jinja2")
_NOT_IN_IDS = frozenset(
    {"name_or_path", "init_inputs", "init_kwargs", "files_loaded", "deprecation_warnings", "verbose"}
    | {"_in_target_context_manager", "keeps_chat_template", "padding_side", "truncation_side"}
)
"""Attributes of a tokenizer that say where it is from and what it has said, or count for batches alone."""


def rows_key(kind: str, reader: SplitReader, tokenizer: TextTokenizer, settings: DataSettings) -> str:
    """Return the key of what is encoded or measured.

    The content of the files counts, not their times, and their names, which reports and messages tell. So
    does the code that makes the rows: nobody has to remember to raise a version.

    Args:
        kind: what is kept.
        reader: of the split.
        tokenizer: a GLM tokenizer.
        settings: the data settings, lengths in place.

    Returns:
        32 hexadecimal digits.

    Raises:
        DataError: a file cannot be read.
    """
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    of = reader.settings
    parts = {
        "kind": kind,
        "sources": [_source(source, of, reader.split) for source in reader.sources],
        "limit": reader.limit,
        "need_answers": reader.need_answers,
        "part": [reader.part, of.validation_frac, of.validation_seed, of.max_samples_of(reader.split)]
        if reader.part
        else None,
        "settings": {name: value for name, value in values.items() if name not in NOT_IN_ROWS},
        "tokenizer": tokenizer_digest(tokenizer),
        "code": _code_digest(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _source(source: str, settings: DataSettings, split: str) -> list[str]:
    """Identify the rows of a file, or of a data set of the hub."""
    if is_on_hub(source):
        name, split, loaded = load_hub(source, split, settings.hub_subset)
        return ["hub", name, split, str(getattr(loaded, "_fingerprint", ""))]
    file = archive_of(Path(source)) or Path(source)
    if not file.is_file():  # a pipe, perhaps, which would be waited for: reading says what is wrong
        return [source, ""]
    try:
        with file.open("rb") as opened:
            return [source, hashlib.file_digest(opened, "sha256").hexdigest()]
    except OSError as error:
        raise unreadable(file, error) from None


def tokenizer_digest(tokenizer: TextTokenizer) -> str:
    """Return what tells a tokenizer from others: its class, and all that it holds of its files.

    Args:
        tokenizer: of any class; one that encodes alike and is built otherwise has another digest.
    """
    digest = hashlib.sha256()
    state = {name: value for name, value in vars(tokenizer).items() if name not in _NOT_IN_IDS}
    for part in _canonical([_name(type(tokenizer)), state], ()):
        digest.update(part)
    return digest.hexdigest()


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _canonical(value: Any, above: tuple[int, ...]) -> list[bytes]:
    """Lay a value out as bytes, in one order whatever the process.

    Pickles would not do: sets come in the order of hashes, which differ from process to process.
    """
    if id(value) in above:
        return [b"<above>"]
    above = (*above, id(value))
    if value is None or isinstance(value, bool | int | float | str | bytes):
        text = value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace")
        return [f"{type(value).__name__}:{len(text)}:".encode(), text]
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return [_name(value).encode()]
    if isinstance(value, Enum):
        return [_name(type(value)).encode(), value.name.encode()]
    if isinstance(value, Mapping):
        items = [b"".join(_canonical(key, above) + _canonical(item, above)) for key, item in value.items()]
        return [b"{", *sorted(items), b"}"]
    if isinstance(value, set | frozenset):
        return [b"<", *sorted(b"".join(_canonical(item, above)) for item in value), b">"]
    if isinstance(value, Sequence):
        return [b"[", *(part for item in value for part in _canonical(item, above)), b"]"]
    made = value.__reduce_ex__(4)  # what pickling it would keep
    if isinstance(made, str):
        return [made.encode()]
    items = [list(each) for each in made[3:5] if each is not None]
    return [_name(type(value)).encode(), *_canonical([*made[1:3], *items], above)]


@functools.cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for place in _CODE:
        for file in sorted([root / place] if place.endswith(".py") else (root / place).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
