"""The releases that share `model_type: chatglm`, and how to tell them apart; folders in transformers' format.

Seven release lines differ in prompt, tokenizer, end tokens and the meaning of ``rope_ratio``, but their
config.json do not say which one they are. What the keys cannot tell is read off names, which people change;
so everything glmtune writes carries ``glmtune_family``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from glmtune.errors import CheckpointError, ConfigError, unknown_name
from glmtune.storage.json_files import read_json_object

LOGGER = logging.getLogger(__name__)

FIRST_GENERATION_KEYS = frozenset({"inner_hidden_size", "position_encoding_2d", "max_sequence_length"})
LATER_GENERATION_KEYS = frozenset(
    {"ffn_hidden_size", "kv_channels", "padded_vocab_size", "multi_query_group_num"}
)

NATIVE_TYPES = ("glm", "glm4")
"""model_type of checkpoints in transformers' own format."""
MIXTURES = ("glm4_moe", "glm4_moe_lite")
"""model_type of GLMs with a mixture of experts, which transformers alone computes."""

_IN_TRANSFORMERS_FORMAT = re.compile(r"-hf$|-0414$|glm[-_](z1|edge)")
"""Names of releases that came in transformers' format."""

FAMILY_KEY = "glmtune_family"
"""Key we write into config.json and tokenizer_config.json; it decides whenever it is present."""


class Family(StrEnum):
    """One release line: same architecture rules, same tokenizer, same prompt."""

    CHATGLM = "chatglm"
    CHATGLM2 = "chatglm2"
    CHATGLM2_32K = "chatglm2-32k"
    CODEGEEX2 = "codegeex2"
    CHATGLM3 = "chatglm3"
    CHATGLM3_32K = "chatglm3-32k"
    GLM4 = "glm4"
    TRANSFORMERS = "transformers"
    """Any folder in transformers' own format (releases with -hf or 0414 in their names, GLM-Z1, GLM-Edge),
    whose tokenizer.json and chat template are its own."""


SECOND_GENERATION = frozenset({Family.CHATGLM2, Family.CHATGLM2_32K, Family.CODEGEEX2})
"""Families whose long-context releases divide positions; later ones multiply the rotary base."""


def why_not_tuned(model_type: str, tune: str) -> str:
    """Word why a mixture of experts is not tuned in some way, for an error.

    Args:
        model_type: of `MIXTURES`.
        tune: ``prefix`` or ``full``.
    """
    what = "has no place for a prefix yet" if tune == "prefix" else "is too large to tune as a whole here"
    return (
        f"`tune` is `{tune}`, but a mixture of experts ({model_type}) {what}. Use `+recipe=lora`, which "
        "tunes its attention."
    )


def parse_family(value: str) -> Family:
    """Turn a setting into a family.

    Args:
        value: a family's name, such as ``chatglm2-32k``.

    Raises:
        ConfigError: no family has that name; the valid ones are listed, nearest first.
    """
    try:
        return Family(value)
    except ValueError:
        raise ConfigError(
            unknown_name("`model.family`", value, [family.value for family in Family])
        ) from None


def family_of_config(config: object) -> Family:
    """Return the release line that a native configuration carries.

    There is no default: the wrong line loads and saves without an error, but with another prompt, other end
    tokens and, in the long-context releases, another meaning of the positions.

    Args:
        config: as made by `native_config`.

    Raises:
        CheckpointError: it carries none, or one that does not exist.
    """
    value = getattr(config, FAMILY_KEY, None)
    if value is None:
        raise CheckpointError(
            f"This {type(config).__name__} does not say which release line it is of: it has no "
            f"`{FAMILY_KEY}`. Make it with `native_config` from an official config.json, or set "
            f"`config.{FAMILY_KEY}` to one of {', '.join(Family)}."
        )
    if value not in list(Family):
        raise CheckpointError(unknown_name(f"`{FAMILY_KEY}` of the configuration", str(value), list(Family)))
    return Family(value)


def detect_family(folder: Path, config: Mapping[str, Any]) -> Family:
    """Decide which release line a checkpoint belongs to.

    The generation comes from the keys of config.json. Names (in config.json, tokenizer_config.json and the
    folder, in this order) separate the lines that share their keys. A `glmtune_family` key wins over all.

    Args:
        folder: the checkpoint's folder; only its name and its tokenizer_config.json are looked at.
        config: content of its config.json.

    Returns:
        The family.

    Raises:
        CheckpointError: not a GLM configuration, or a rope_ratio whose rule no name decides.
    """
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    for holder in (config, tokenizer_config):
        if FAMILY_KEY in holder:
            return parse_family(str(holder[FAMILY_KEY]))
    if FIRST_GENERATION_KEYS & config.keys():
        return Family.CHATGLM
    if config.get("model_type") in NATIVE_TYPES:
        return Family.TRANSFORMERS
    if config.get("model_type") != "chatglm" and is_known_to_transformers(config.get("model_type")):
        return Family.TRANSFORMERS
    if not LATER_GENERATION_KEYS & config.keys():
        raise CheckpointError(
            f"{folder}/config.json is no official GLM configuration: model_type is "
            f"{config.get('model_type')!r} and it has neither {', '.join(sorted(FIRST_GENERATION_KEYS))} "
            f"(ChatGLM-6B) nor {', '.join(sorted(LATER_GENERATION_KEYS))} (later ones). "
            "Point `model.source` at an official checkpoint."
        )
    if isinstance(config.get("eos_token_id"), list):  # only GLM-4's files name several end tokens
        return Family.GLM4
    return _by_name(folder, config, tokenizer_config)


def is_known_to_transformers(model_type: object) -> bool:
    """Whether transformers has an architecture of this name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES


def detect_tokenizer_family(folder: Path) -> Family:
    """Decide which release line tokenizer files belong to that lie in a folder without config.json.

    Args:
        folder: holds ``ice_text.model`` or ``tokenizer.model`` and, as a rule, ``tokenizer_config.json``.

    Returns:
        The family; from ``glmtune_family``, else from the vocabulary file and the tokenizer's class, else
        from names.

    Raises:
        CheckpointError: none of these tells the family.
    """
    config = read_json(folder / "tokenizer_config.json")
    if FAMILY_KEY in config:
        return parse_family(str(config[FAMILY_KEY]))
    if (folder / "ice_text.model").is_file():
        return Family.CHATGLM
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        return Family.TRANSFORMERS
    if config.get("tokenizer_class") == "ChatGLM4Tokenizer":
        return Family.GLM4
    found = [family for name in _names(folder, {}, config) if (family := family_of_name(name))]
    if not found:
        raise CheckpointError(
            f"{folder} has no config.json, and neither a name nor `{FAMILY_KEY}` in tokenizer_config.json "
            f"tells whose tokenizer it holds. Pass `family=`, one of {', '.join(Family)}."
        )
    return found[0]


def _by_name(folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> Family:
    """Separate ChatGLM2, CodeGeeX2, ChatGLM3 and GLM-4, whose keys are the same."""
    found = [family for name in _names(folder, config, tokenizer_config) if (family := family_of_name(name))]
    if "<|assistant|>" in json.dumps(tokenizer_config):  # ChatGLM3's role tokens; after the names: weaker
        found.append(Family.CHATGLM3)
    ratio = config.get("rope_ratio", 1)
    # With a ratio the wrong line would compute other positions, so here names must agree on the side.
    if ratio != 1 and len({family in SECOND_GENERATION for family in found}) != 1:
        raise CheckpointError(
            f"{folder}/config.json has rope_ratio {ratio}, which ChatGLM2-32K applies to the positions and "
            f"later releases to the rotary base, and no name in it tells which one it is "
            f"(names point at: {', '.join(found) or 'nothing'}). "
            f"Pass `family=` (`model.family=`): {Family.CHATGLM2_32K}, {Family.CHATGLM3_32K} or "
            f"{Family.GLM4}."
        )
    if not found:
        LOGGER.warning(
            "%s: no name in config.json, tokenizer_config.json or the folder tells ChatGLM2 from ChatGLM3; "
            "taking chatglm2. Pass family= (model.family=) if its prompts should be another release's.",
            folder,
        )
        return Family.CHATGLM2
    # CodeGeeX2 was trained from ChatGLM2, whose name its files may hold too.
    family = Family.CODEGEEX2 if Family.CODEGEEX2 in found else found[0]
    if ratio != 1:
        return {Family.CHATGLM2: Family.CHATGLM2_32K, Family.CHATGLM3: Family.CHATGLM3_32K}.get(
            family, family
        )
    return family


def family_of_name(name: str) -> Family | None:
    """Read a family out of a repository or folder name, or return None.

    >>> family_of_name("THUDM/chatglm2-6b-32k"), family_of_name("models--zai-org--glm-4-9b")
    (<Family.CHATGLM2_32K: 'chatglm2-32k'>, <Family.GLM4: 'glm4'>)
    >>> family_of_name("zai-org/GLM-Z1-9B-0414"), family_of_name("glm-4-9b-chat-hf")
    (<Family.TRANSFORMERS: 'transformers'>, <Family.TRANSFORMERS: 'transformers'>)
    """
    if _IN_TRANSFORMERS_FORMAT.search(name.lower()):
        return Family.TRANSFORMERS
    match = re.search(r"(codegeex2)|(chatglm[-_]?3)|(chatglm[-_]?2)|(?<![a-z])(glm[-_]?4)", name.lower())
    if match is None:
        return None
    long_context = re.search(r"(32|128)k", name.lower()) is not None
    if match[1]:
        return Family.CODEGEEX2
    if match[2]:
        return Family.CHATGLM3_32K if long_context else Family.CHATGLM3
    if match[3]:
        return Family.CHATGLM2_32K if long_context else Family.CHATGLM2
    return Family.GLM4


def _names(folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> list[str]:
    """Names that may tell the release, the most telling first."""
    names = [
        str(config.get("_name_or_path") or ""),
        str(tokenizer_config.get("name_or_path") or ""),
        folder.name,
    ]
    if folder.parent.name == "snapshots":  # the hub's cache: models--org--name/snapshots/<commit>
        names.append(folder.parent.parent.name)
    return [re.sub(r".*/(?=[^/]+/[^/]+$)", "", name) for name in names if name]


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one where there is no file.

    Raises:
        CheckpointError: see `read_json_object`.
    """
    return read_json_object(file) if file.is_file() else {}
