"""What an ``adapter_config.json`` says, read by a list of keys and values instead of by PEFT.

PEFT makes its own configuration of whatever the file holds: names of modules to import, regular expressions
to run against the names of layers (one that backtracks takes years), layers to repeat, ranks to allocate.
Here the file is data. Every key is either read and checked, or must have the one value under which an
adapter is a product of two matrices per layer, or is known to change nothing; any other is refused by its
name, unless its value says that it is switched off. Which layers are adapted is worked out from names alone,
so PEFT is given a list of full names.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from glmtune.errors import CheckpointError
from glmtune.storage.json_files import read_json_object, shown

LOGGER = logging.getLogger(__name__)
Number = TypeVar("Number", int, float)

PLAIN_LORA: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "megatron_config": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
    "ensure_weight_tying": False,
}
"""Keys and the values under which an adapter only adds a product of two matrices to a layer's own."""
NO_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "lora_dropout",
    "lora_ga_config", "loftq_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
})  # fmt: skip
"""Keys that are left unread: origin, training, settings of what `PLAIN_LORA` and `HARMLESS_STARTS` rule out.

``auto_mapping`` and ``megatron_core`` name Python modules, which PEFT may import; nothing here does."""
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base as it is. The others (``pissa``, ``olora``, ``corda``,
``loftq``, ...) change it when training starts, so their matrices mean nothing on the released weights."""
READ = frozenset({
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights",
})  # fmt: skip
MAX_RANK, MAX_ALPHA, MAX_NAMES = 65536, 1e9, 10_000
NAME = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
"""Of a layer or the end of one: words and dots, nothing that a regular expression reads otherwise."""
SUFFIXES = re.compile(
    r"\^?(?:\(\?:|\()?\.\*(\\\.)?(?:\)\??)?(?:\((?:\?:)?([\w.\\|]+)\)|([\w.\\]+))\$?", re.ASCII
)
"""The one kind of expression that is understood: ``.*\\.(q_proj|v_proj)``, names that end in one of a few."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The checked content of a file.

    Attributes:
        file: where it was read, for messages.
        rank: of layers that ``ranks`` does not name.
        alpha: the same of ``alphas``; the product is scaled by alpha / rank.
        by_root_of_rank: scaled by alpha / sqrt(rank) instead.
        targets: ends of layers' names, at a dot unless ``anywhere``.
        anywhere: a target may begin inside a word (``.*proj``).
        excluded: ends of names that are left out.
        blocks: numbers of the blocks; None takes all.
        block_lists: names of the lists whose numbers these are; empty: any.
        ranks: end of a name → rank.
        alphas: end of a name → alpha.
    """

    file: Path
    rank: int
    alpha: float
    by_root_of_rank: bool
    targets: tuple[str, ...]
    anywhere: bool
    excluded: tuple[str, ...]
    blocks: frozenset[int] | None
    block_lists: tuple[str, ...]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def adapted(self, layers: Iterable[str]) -> list[str]:
        """Return those of a model's layers that the adapter changes, in their order."""
        return [
            name
            for name in layers
            if self._is_target(name) and not _ends_in(name, self.excluded) and self._is_in_block(name)
        ]

    def rank_of(self, layer: str) -> int:
        """Return the rank in one layer."""
        return _by_end(self.ranks, layer, self.rank)

    def alpha_of(self, layer: str) -> float:
        """Return alpha in one layer."""
        return _by_end(self.alphas, layer, self.alpha)

    def _is_target(self, name: str) -> bool:
        return name.endswith(self.targets) if self.anywhere else _ends_in(name, self.targets)

    def _is_in_block(self, name: str) -> bool:
        if self.blocks is None:
            return True
        parts = name.split(".")
        numbers = (
            int(number)
            for before, number in pairwise(parts)
            if number.isdecimal() and (not self.block_lists or before in self.block_lists)
        )
        return next(numbers, None) in self.blocks


def read_adapter_config(file: Path) -> AdapterConfig:
    """Read an ``adapter_config.json``.

    Raises:
        CheckpointError: no JSON object; a key that would change the results in a way that is not computed
            here; a value of another kind. All problems are named.
    """
    stored = read_json_object(file)
    problems = [*_foreign(stored), *_wrong_values(stored)]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems[:20])
        raise CheckpointError(
            f"{file} cannot be used; only plain LoRA is supported:\n{listed}\nMerge the adapter with PEFT in "
            "an environment that you trust it in, or train one with `glmtune train +recipe=lora`."
        )
    targets, anywhere = _targets(stored["target_modules"]) or ((), False)
    blocks = stored.get("layers_to_transform")
    lists = stored.get("layers_pattern") or []
    return AdapterConfig(
        file=file,
        rank=stored["r"],
        alpha=stored.get("lora_alpha", 8),  # PEFT's own where a file leaves it out
        by_root_of_rank=bool(stored.get("use_rslora")),
        targets=targets,
        anywhere=anywhere,
        excluded=tuple(stored.get("exclude_modules") or ()),
        blocks=None if blocks in (None, []) else frozenset([blocks] if isinstance(blocks, int) else blocks),
        block_lists=(lists,) if isinstance(lists, str) else tuple(lists),
        ranks={_plain(end): rank for end, rank in (stored.get("rank_pattern") or {}).items()},
        alphas={_plain(end): alpha for end, alpha in (stored.get("alpha_pattern") or {}).items()},
    )


def _foreign(stored: Mapping[str, Any]) -> list[str]:
    """Describe what would make the adapter something else than a product of two matrices per layer."""
    problems = [
        f"{key} = {shown(stored[key])}, but it must be {plain!r}"
        for key, plain in PLAIN_LORA.items()
        if (stored.get(key) or plain) != plain
    ]
    if stored.get("peft_type") != "LORA":
        problems.append(f"peft_type = {shown(stored.get('peft_type'))}, but it must be 'LORA'")
    start = stored.get("init_lora_weights", True)
    if start is not None and not any(start is known or start == known for known in HARMLESS_STARTS):
        problems.append(
            f"init_lora_weights = {shown(start)}: it changes the base when training starts, so the adapter "
            "does not fit the released weights"
        )
    known = PLAIN_LORA.keys() | NO_EFFECT | READ
    for key in sorted(stored.keys() - known):
        if stored[key] in (None, False, [], {}):
            LOGGER.info("adapter_config.json: `%s` is not known here and switched off; it is ignored.", key)
        else:
            problems.append(
                f"unknown key {shown(key)[1:-1]} = {shown(stored[key])}; it may change the results"
            )
    return problems


def _wrong_values(stored: Mapping[str, Any]) -> list[str]:
    """Describe every value that is read and of another kind."""
    optional: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "lora_alpha": (f"a number above 0, at most {MAX_ALPHA:.0f}", _is_alpha),
        "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
        "exclude_modules": ("a list of names of layers (no regular expression)", _is_names),
        "layers_to_transform": (
            "a number of a block or a list of them",
            lambda value: _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value))),
        ),
        "layers_pattern": (
            "a name or a list of them (no regular expression)",
            lambda value: _is_names([value] if isinstance(value, str) and value else value),
        ),
        "rank_pattern": (
            f"an object of names of layers (no regular expressions) and ranks from 1 to {MAX_RANK}",
            lambda value: _is_pattern(value, _is_rank),
        ),
        "alpha_pattern": (
            "an object of names of layers (no regular expressions) and numbers above 0",
            lambda value: _is_pattern(value, _is_alpha),
        ),
    }
    problems = [
        f"{key} = {shown(stored[key])}, but it must be {rule}"
        for key, (rule, is_right) in optional.items()
        if stored.get(key) is not None and not is_right(stored[key])
    ]
    if not _is_rank(stored.get("r")):
        problems.append(f"r = {shown(stored.get('r'))}, but it must be a whole number from 1 to {MAX_RANK}")
    if _targets(stored.get("target_modules")) is None:
        problems.append(
            f"target_modules = {shown(stored.get('target_modules'))}, but it must be a list of names of "
            "layers (an expression of a file is not run; `.*\\.(NAME|NAME)` is understood)"
        )
    return problems


def _targets(value: Any) -> tuple[tuple[str, ...], bool] | None:
    """Return the ends of names that are adapted, and whether they may begin inside a word; None: not read."""
    if isinstance(value, str):
        match = SUFFIXES.fullmatch(value) if len(value) <= 1000 else None
        ends = [] if match is None else (match[2] or match[3]).split("|")
        names = [_plain(end) for end in ends]
        return (tuple(names), not match[1]) if match is not None and _is_names(names) else None
    return (tuple(value), False) if value and _is_names(value) else None


def _plain(end: str) -> str:
    r"""Take the marks of a regular expression off a name that is no other: ``^model\.q_proj$``."""
    return end.removeprefix("^").removesuffix("$").replace("\\.", ".")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_NAMES


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= MAX_ALPHA and math.isfinite(value)


def _is_names(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) <= MAX_NAMES
    return is_list and all(isinstance(name, str) and NAME.fullmatch(name) for name in value)


def _is_pattern(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and _is_names([*map(_plain, value)]) and all(map(is_right, value.values()))


def _ends_in(name: str, ends: Collection[str]) -> bool:
    """Tell whether one of ``ends`` is the name or its last words."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in ends for start in range(len(parts)))


def _by_end(values: Mapping[str, Number], name: str, default: Number) -> Number:
    return next((value for end, value in values.items() if _ends_in(name, (end,))), default)
