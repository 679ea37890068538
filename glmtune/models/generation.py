"""Where a release ends an answer, and how it samples: the `generation_config` of a loaded model.

`model.generate`, and every engine that reads a saved generation_config.json, knows nothing of our templates.
ChatGLM3's config.json names one end token, but its answers also end where a role token hands over; without
that id `generate` would write the user's next question, too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig

from glmtune.errors import CheckpointError
from glmtune.models.releases.families import Family, family_of_config
from glmtune.models.templates.renderer import template_for
from glmtune.models.tokenizers.load import load_tokenizer_folder, tokenizer_class_of
from glmtune.storage.json_files import read_json_object, shown

LOGGER = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
RELEASED_VOCABULARY = 65024
"""Rows of ChatGLM3's embedding."""
RELEASED_STOPS = {
    Family.CHATGLM3: (2, 64795, 64797),  # </s>, <|user|>, <|observation|>
    Family.CHATGLM3_32K: (2, 64795, 64797),
}
"""Ends of answers that config.json does not tell, for folders without a tokenizer."""


def release_generation(folder: Path, config: Any) -> GenerationConfig:
    """Return how a checkpoint generates where its user says nothing.

    Args:
        folder: of the checkpoint; its tokenizer tells the ids that end an answer, its generation_config.json
            how the release samples. Neither has to be there.
        config: as made by `native_config`.

    Returns:
        All ids that end an answer, the id that pads, and the release's sampling; greedy where it tells none.
    """
    own = _own_values(folder / GENERATION_FILE, config.vocab_size)
    stops = [*_ids(config.eos_token_id), *_ids(own.pop("eos_token_id", None)), *_stop_ids(folder, config)]
    stops = list(dict.fromkeys(stops))
    if "max_length" in own:
        own["max_length"] = min(own["max_length"], config.max_position_embeddings)
    tokens = {"pad_token_id": config.pad_token_id, "bos_token_id": config.bos_token_id}
    if not own.get("do_sample"):  # transformers writes no file in which greedy decoding has a temperature
        own = {name: value for name, value in own.items() if name not in _SAMPLING} | {"do_sample": False}
    return GenerationConfig(**{**tokens, **own, "eos_token_id": stops if len(stops) > 1 else stops[0]})


def _stop_ids(folder: Path, config: Any) -> Iterable[int]:
    family = family_of_config(config)
    if (folder / tokenizer_class_of(folder, family).vocab_files_names["vocab_file"]).is_file():
        try:
            tokenizer = load_tokenizer_folder(folder, family)
            return template_for(tokenizer).stop_ids(cast(Any, tokenizer))
        except CheckpointError as error:
            # Whoever needs the tokenizer will be told; a model can be of use without it.
            LOGGER.warning("Where answers end is taken from config.json alone: %s", error)
    return RELEASED_STOPS.get(family, ()) if config.vocab_size == RELEASED_VOCABULARY else ()


def _own_values(file: Path, vocab_size: int) -> dict[str, Any]:
    """Return what a generation_config.json says of those keys that are read; strangers wrote it."""
    if not file.is_file():
        return {}
    try:
        stored = read_json_object(file)
    except CheckpointError as error:
        LOGGER.warning("The release's own sampling is not known: %s", error)
        return {}
    values: dict[str, Any] = {}
    for name, (rule, is_right) in _RULES.items():
        value = stored.get(name)
        if value is None:
            continue
        if is_right(value) and (name not in _TOKENS or all(0 <= each < vocab_size for each in _ids(value))):
            values[name] = value
        else:
            LOGGER.warning("%s: %s is %s, but it must be %s; not used.", file, name, shown(value), rule)
    return values


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 63


def _is_id_or_ids(value: Any) -> bool:
    return _is_whole(value) or (
        isinstance(value, list) and 0 < len(value) <= 100 and all(map(_is_whole, value))
    )


def _above_zero(most: float) -> Callable[[Any], bool]:
    def is_right(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and 0 < value <= most and math.isfinite(value)

    return is_right


_SAMPLING = ("temperature", "top_p", "top_k")
_TOKENS = ("eos_token_id", "pad_token_id")
_RULES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "do_sample": ("true or false", lambda value: isinstance(value, bool)),
    "temperature": ("a number above 0, at most 100", _above_zero(100)),
    "top_p": ("a number above 0, at most 1", _above_zero(1)),
    "top_k": ("a whole number from 0", lambda value: _is_whole(value) and value >= 0),
    "repetition_penalty": ("a number above 0, at most 100", _above_zero(100)),
    "max_length": ("a whole number from 1", lambda value: _is_whole(value) and value >= 1),
    "eos_token_id": ("the id of a token, or a list of such", _is_id_or_ids),
    "pad_token_id": ("the id of a token", _is_whole),
}
