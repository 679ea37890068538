"""Examples of preference tuning: two encoded rows each, which are always in one batch.

    pairs    a row is the better or the worse answer         example i = rows 2i and 2i + 1
    judged   a row is an answer that is desirable or not     example i = row i and a mismatched one

The mismatched row of a judged answer is its prompt with the answer of another row. By such rows KTO estimates
how far the policy is from the reference; that they depend on nothing but the data keeps steps repeatable.

A batch of B examples has 2B rows: the first ones of all examples, then the second ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmtune.data.collate import DynamicPaddingCollator
from glmtune.data.dataset import EncodedSplit
from glmtune.data.rows import RowSet
from glmtune.errors import ConfigError
from glmtune.labels import IGNORE_INDEX
from glmtune.preference.settings import PreferenceSettings


class PreferenceRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples by number.

    Attributes:
        desirable: the judgement of every example, bool ``[examples]``; True of pairs.
        are_paired: whether rows 2i and 2i + 1 answer one prompt, be they one example (pairs) or two (judged).
        lengths: tokens of both rows of every example.
        reference: log-probabilities of both rows under the reference, float32 ``[examples, 2]``; None: not
            kept.
        fingerprint: of all that decides these log-probabilities but the model: conversations, and what cuts
            them.
    """

    def __init__(self, split: EncodedSplit, settings: PreferenceSettings) -> None:
        """Plan the examples; tokens are put together when one is asked for.

        Args:
            split: encoded with the layout ``preference``.
            settings: of the loss.

        Raises:
            ConfigError: the loss needs pairs, and these are judged answers; or there are too few.
        """
        self._rows, count = split.rows, len(split.lengths)
        self._lengths = np.asarray(split.lengths, dtype=np.int64)
        self.are_paired = count == 2 * split.num_conversations
        if not self.are_paired and count != split.num_conversations:
            raise ConfigError(
                f"{split.path} has pairs and judged answers in one split, but a loss learns from one kind."
                " Give files of one kind."
            )
        if settings.takes_pairs and not self.are_paired:
            raise ConfigError(
                f"`preference.loss` is `{settings.loss}`, which compares two answers, but the rows of"
                f" {split.path} have one that is judged. Use `preference.loss=kto` (`+recipe=kto`)."
            )
        self._takes_pairs = settings.takes_pairs
        if not self._takes_pairs and count < 3:
            raise ConfigError(
                f"{split.path} has {split.num_conversations} rows, but `preference.loss` is `kto`, which"
                " measures each answer against those to other prompts. Give at least three."
            )
        self._desirable = np.asarray(split.desirable, dtype=np.bool_)
        self.reference: np.ndarray | None = None
        data = split.settings
        shape = (data.max_source_length, data.max_target_length, data.source_prefix, data.loss_on_thoughts)
        self.fingerprint = sha256(f"{split.fingerprint} {shape} {settings.takes_pairs}".encode()).hexdigest()

    @property
    def desirable(self) -> np.ndarray:
        """See the class."""
        return self._desirable[::2] if self._takes_pairs else self._desirable

    @property
    def lengths(self) -> list[int]:
        """See the class."""
        first, second = self._lengths, np.roll(self._lengths, -self._shift)
        if self._takes_pairs:
            first, second = self._lengths[::2], self._lengths[1::2]
        return (first + second).tolist()  # of a mismatched row about: its prompt is not the other's

    @property
    def _shift(self) -> int:
        # From the other half of the rows: neighbours may have the same prompt. Even, so that of pairs made
        # into two examples the better answers stay beside better ones.
        return max(2, len(self._lengths) // 4 * 2)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._lengths) // 2 if self._takes_pairs else len(self._lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example: both rows one behind the other, and where the second begins."""
        if self._takes_pairs:
            first, second = self._tokens(2 * index), self._tokens(2 * index + 1)
        else:
            first = self._tokens(index)
            second = _mismatched(first, self._tokens((index + self._shift) % len(self)))
        example: dict[str, Any] = {
            "input_ids": [*first[0], *second[0]],
            "labels": [*first[1], *second[1]],
            "first_length": len(first[0]),
            "example": index,
            "desirable": bool(self.desirable[index]),
        }
        if self.reference is not None:
            example["reference"] = self.reference[index].tolist()
        return example

    def _tokens(self, row: int) -> tuple[list[int], list[int]]:
        values = self._rows[row]
        return values["input_ids"], values["labels"]


def _mismatched(
    row: tuple[Sequence[int], Sequence[int]], other: tuple[Sequence[int], Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Return the prompt of one row with the answer of another; an answer is what carries loss, to the end."""
    prompt = row[0][: _answer_start(row[1])]
    start = _answer_start(other[1])
    return [*prompt, *other[0][start:]], [*[IGNORE_INDEX] * len(prompt), *other[1][start:]]


def _answer_start(labels: Sequence[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


@dataclass(frozen=True)
class PreferenceCollator:
    """Pad the rows of examples on the right to the longest of the batch.

    Attributes:
        pad_token_id: written to ``input_ids`` where there is no token.
        pad_to_multiple_of: the padded length is rounded up to a multiple of this, in tokens.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1
    _pad: DynamicPaddingCollator = field(init=False)

    def __post_init__(self) -> None:
        """Make what pads."""
        object.__setattr__(self, "_pad", DynamicPaddingCollator(self.pad_token_id, self.pad_to_multiple_of))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Build the batch.

        Args:
            rows: B examples of `PreferenceRows`.

        Returns:
            ``input_ids``, ``labels`` and ``attention_mask``, int64 ``[2B, S]``: first rows, then second ones;
            ``examples`` int64 ``[B]``, ``desirable`` bool ``[B]``, and if it is kept ``reference``: float32
            ``[2, B]`` under the bits of int32, as floats of a batch are rounded to 16 bits where DeepSpeed
            computes in them.
        """
        parts: list[dict[str, list[int]]] = []
        for second in (False, True):
            for row in rows:
                cut = slice(row["first_length"], None) if second else slice(row["first_length"])
                parts.append({name: list(row[name][cut]) for name in ("input_ids", "labels")})
        batch = self._pad(parts)
        batch["examples"] = torch.tensor([row["example"] for row in rows])
        batch["desirable"] = torch.tensor([row["desirable"] for row in rows])
        if all("reference" in row for row in rows):
            kept = torch.tensor([row["reference"] for row in rows], dtype=torch.float32)
            batch["reference"] = kept.T.contiguous().view(torch.int32)
        return batch


def preference_set(split: EncodedSplit, settings: PreferenceSettings) -> RowSet:
    """Return the examples of a split as training batches them.

    Args:
        split: encoded with the layout ``preference``.
        settings: of the loss.

    Raises:
        ConfigError: see `PreferenceRows`.
    """
    rows = PreferenceRows(split, settings)
    # Of pairs made into two examples each: the row of the file that an example is of.
    packs = None if settings.takes_pairs or not rows.are_paired else [[i // 2] for i in range(len(rows))]
    return RowSet(rows, rows.lengths, packs)
