"""Settings of a data set: where its rows are, how they are laid out, how long they may become."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from glmtune.errors import ConfigError
from glmtune.settings import build_settings, check_choice, check_range, setting

SPLITS = ("train", "validation", "test")
PREFERENCE = "preference"
"""The layout of rows with two answers, or a judged one."""
LAYOUT_NAMES = ("auto", "columns", "adgen", "alpaca", "sharegpt", "openai", PREFERENCE)
LOSS_ON = ("answer", "all_turns", "everything")
ON_BAD_ROW = ("error", "skip")
CACHE = ("auto", "always", "never")


_TAKEN = ("switched",)
"""Of what evaluation measures beside the sets of a mixture: `eval_switched_loss`."""


@dataclass(frozen=True)
class MixedSet:
    """One data set of a mixture; what it leaves out is as in the settings around it."""

    name: str = setting("", "what it is called in reports: letters, digits, `_` and `-`")
    weight: float | None = setting(
        None, "its share of an epoch's rows, relative to the others'; null: as many as it has"
    )
    train_file: str | list[str] | None = setting(None, "as data.train_file")
    validation_file: str | list[str] | None = setting(None, "as data.validation_file")
    dir: str | None = setting(None, "as data.dir")
    hub_subset: str | None = setting(None, "as data.hub_subset")
    layout: str | None = setting(None, "as data.layout")
    prompt_column: str | None = setting(None, "as data.prompt_column")
    response_column: str | None = setting(None, "as data.response_column")
    history_column: str | None = setting(None, "as data.history_column")
    source_prefix: str | None = setting(None, "as data.source_prefix")
    system: str | None = setting(None, "as data.system")
    max_train_samples: int | None = setting(None, "as data.max_train_samples")
    max_eval_samples: int | None = setting(None, "as data.max_eval_samples")

    def __post_init__(self) -> None:
        """Check name, weight and file.

        Raises:
            ConfigError: one is missing, or not as it must be.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", self.name) or self.name in _TAKEN:
            raise ConfigError(
                f"`data.mix[].name` is `{self.name}`, but every set needs one of letters, digits, `_` and"
                " `-`, 40 at most, and `switched` is another figure's:"
                " `data.mix=[{name:ads,train_file:ads.jsonl},...]`."
            )
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ConfigError(
                f"`weight` of `{self.name}` in `data.mix` is {self.weight}, but it must be above 0. Leave a"
                " set out that is not to be learnt."
            )
        if not self.train_file:
            raise ConfigError(f"`train_file` of `{self.name}` in `data.mix` is not set. Name its rows.")


@dataclass(frozen=True)
class DataSettings:
    """Where the rows are and how they become tokens."""

    name: str = setting("files", "named data set whose usual folders are searched, or `files` for own files")
    dir: str | None = setting(None, "folder of the files below; relative file names are looked up there")
    train_file: str | list[str] | None = setting(
        None,
        "training rows: file (also .gz), folder, pattern (`parts/*.jsonl`), .zip, list of these,"
        " `owner/name[:split]` on the hub, `shipped:...`",
    )
    validation_file: str | list[str] | None = setting(
        None, "rows for evaluation during training, named likewise"
    )
    test_file: str | list[str] | None = setting(None, "rows for prediction, named likewise")
    mix: list[dict[str, Any]] | None = setting(
        None,
        "several data sets instead of train_file, each {name, weight, train_file, validation_file, layout,"
        " ...}; see docs/data.md",
    )
    validation_frac: float = setting(
        0.0, "without a validation file: share of the training rows that is kept for evaluation, not learnt"
    )
    validation_seed: int = setting(42, "decides which rows these are; equal questions stay together")
    hub_subset: str | None = setting(None, "subset (configuration) of a hub data set")

    layout: str = setting(
        "auto",
        "how a row is laid out: auto, columns, adgen, alpaca, sharegpt or openai; preference: two answers",
    )
    prompt_column: str | None = setting(None, "column of the question (layout columns or preference)")
    response_column: str | None = setting(
        None, "column of the answer (layout columns), of the better one (preference)"
    )
    rejected_column: str | None = setting(None, "column of the worse answer (layout preference)")
    history_column: str | None = setting(None, "column of earlier turns, a list of [question, answer] pairs")
    on_bad_row: str = setting(
        "error", "what an unusable row does: `error` stops, `skip` leaves it out and counts it"
    )

    source_prefix: str = setting("", "text put in front of every prompt")
    system: str | None = setting(None, "system message of the rows that begin with none")
    max_source_length: int | None = setting(
        None,
        "longest prompt, in tokens; oldest turns go first, then the question's end; null: what holds 99 % of"
        " the rows",
    )
    max_target_length: int | None = setting(
        None, "longest answer, in tokens, end token not counted; null: what holds 99 % of the rows"
    )
    max_train_samples: int | None = setting(None, "use only the first rows of the training split")
    max_eval_samples: int | None = setting(None, "use only the first rows of the validation split")
    max_predict_samples: int | None = setting(None, "use only the first rows of the test split")

    loss_on: str = setting(
        "answer",
        "what is learnt: `answer` (the last one), `all_turns` (every answer) or `everything` (questions too)",
    )
    loss_on_thoughts: bool = setting(
        True,
        "learn the thoughts of an answer too (`<think>...</think>` in front of it); false: only what follows"
        " them, with the thoughts before it",
    )
    packing: bool = setting(
        False, "fill rows of `packing_length` with several samples that cannot see each other"
    )
    packing_length: int = setting(1024, "length of a packed row, in tokens")
    pad_to_multiple_of: int = setting(
        1, "round the padded length of a batch up to a multiple of this, in tokens"
    )

    streaming: bool = setting(
        False,
        "read training rows as they are learnt, encoded by then and never kept; needs trainer.max_steps",
    )
    shuffle_buffer: int | None = setting(
        None, "with streaming: rows among which the next one is drawn; null: 10,000"
    )

    cache: str = setting(
        "auto",
        "keep encoded rows on disk: `auto` (those of files above 16 MB in all), `always` or `never`",
    )
    cache_dir: str | None = setting(
        None, "folder of encoded rows; null: `rows` in $GLMTUNE_CACHE, by default ~/.cache/glmtune"
    )
    num_workers: int | None = setting(
        None, "processes that encode; null: as many as cores, 4 at most, and one for small files"
    )

    def __post_init__(self) -> None:
        """Check every rule and report all problems together.

        Raises:
            ConfigError: naming each setting, its value, the rule and the way out.
        """
        problems: list[str] = []
        for path, value, valid in (
            ("data.layout", self.layout, LAYOUT_NAMES),
            ("data.loss_on", self.loss_on, LOSS_ON),
            ("data.on_bad_row", self.on_bad_row, ON_BAD_ROW),
            ("data.cache", self.cache, CACHE),
        ):
            try:
                check_choice(path, value, valid)
            except ConfigError as error:
                problems.append(str(error))
        for name in ("max_source_length", "max_target_length", "packing_length", "pad_to_multiple_of",
                     "max_train_samples", "max_eval_samples", "max_predict_samples",
                     "num_workers", "shuffle_buffer"):  # fmt: skip
            value = getattr(self, name)
            try:
                if value is not None:
                    check_range(f"data.{name}", value, low=1)
            except ConfigError as error:
                problems.append(str(error))
        problems += self._column_problems() + self._validation_problems() + self._mix_problems()
        problems += self._packing_problems() + self._streaming_problems() + self._preference_problems()
        if self.loss_on == "everything" and not self.loss_on_thoughts:
            problems.append(
                "`data.loss_on_thoughts` is false, but `data.loss_on` is `everything`, thoughts included. Use"
                " `answer` or `all_turns`, or leave loss_on_thoughts out."
            )
        if problems:
            raise ConfigError("\n".join(problems))

    def _preference_problems(self) -> list[str]:
        if self.layout != PREFERENCE:
            return []
        compared = "but `data.layout` is `preference`: whole answers are compared,"
        return [
            f"`data.{name}` is {shown}, {compared} {why}. Use `data.{name}={way}`."
            for name, is_wrong, shown, why, way in (
                ("loss_on", self.loss_on != "answer", f"`{self.loss_on}`", "the last of each row", "answer"),
                ("packing", self.packing, "true", "and both of a pair must be in one batch", "false"),
                ("streaming", self.streaming, "true", "with a reference that is made of all rows", "false"),
                ("mix", self.mix is not None, "given", "and sets of them are not mixed; one file may list"
                 " several", "null"),
            )
            if is_wrong
        ]  # fmt: skip

    def _streaming_problems(self) -> list[str]:
        if not self.streaming:
            if self.shuffle_buffer is not None:
                return [
                    f"`data.shuffle_buffer` is {self.shuffle_buffer}, but `data.streaming` is false: without"
                    " it all rows are shuffled. Leave it out."
                ]
            return []
        unknown = "but `data.streaming` is true, and rows are read one by one:"
        found = [
            f"`data.{name}` is null, {unknown} nobody knows the lengths of all. Give a number, such as 512."
            for name in ("max_source_length", "max_target_length")
            if getattr(self, name) is None
        ]
        for name, why, way in (
            ("packing", "packs are planned by the lengths of all", "`data.packing=false`"),
            ("mix", "a mixture is planned by the sizes of its sets", "`data.mix=null`"),
            (
                "validation_frac",
                "which are kept from training is told by all",
                "give a `data.validation_file`",
            ),
        ):
            if value := getattr(self, name):
                shown = "given" if name == "mix" else value
                found.append(f"`data.{name}` is {shown}, {unknown} {why}. Use {way}.")
        return found

    def _packing_problems(self) -> list[str]:
        if self.max_source_length is None or self.max_target_length is None:
            return []  # asked again when the data has told them
        longest = self.max_source_length + self.max_target_length + 1
        if self.packing and self.packing_length < longest:
            return [
                f"`data.packing_length` is {self.packing_length}, but a packed row must hold the longest"
                f" sample: max_source_length {self.max_source_length} + max_target_length"
                f" {self.max_target_length} + 1 end token = {longest}. Raise packing_length to at least"
                f" {longest} or shorten the samples."
            ]
        return []

    def _column_problems(self) -> list[str]:
        columns = {
            "prompt_column": self.prompt_column,
            "response_column": self.response_column,
            "history_column": self.history_column,
        }
        given = [name for name, value in columns.items() if value]
        named = " and ".join(f"`data.{name}`" for name in given)
        if self.layout == PREFERENCE:
            return []
        if self.rejected_column:
            return [
                f"`data.rejected_column` is `{self.rejected_column}`, but `data.layout` is `{self.layout}`,"
                " whose rows have one answer. Use `data.layout=preference` (`preference=dpo` learns from it),"
                " or leave it out."
            ]
        if given and self.layout not in ("auto", "columns"):
            return [
                f"{named} cannot be obeyed: `data.layout` is `{self.layout}`, whose columns are fixed. Use"
                " `data.layout=columns` (or auto), or leave the column names out."
            ]
        if (given or self.layout == "columns") and not self.prompt_column:
            return [
                "`data.prompt_column` is not set, but the layout `columns`"
                + (f" (chosen by {named})" if given else "")
                + " needs it, and for training response_column too. Set it to the name of the column."
            ]
        return []

    def _mix_problems(self) -> list[str]:
        if self.mix is None:
            return []
        for name in ("train_file", "validation_file"):
            if value := getattr(self, name):
                return [
                    f"`data.mix` is given and `data.{name}` is `{value}`, but the rows are those of the sets"
                    f" in the mixture. Add `data=files`, or `data.{name}=null`; each set has its own {name}."
                ]
        try:
            sets = mixed_sets(self)
        except ConfigError as error:
            return [str(error)]
        if any(own.layout == PREFERENCE for _, own in sets):
            return [
                "`data.mix` has a set with the layout `preference`, but preference pairs are not mixed with"
                " other rows. Learn from them in a run of their own: `data.layout=preference`."
            ]
        names, weights = [each.name for each, _ in sets], [each.weight for each, _ in sets]
        if len(names) < 2 or len(set(names)) < len(names):
            return [
                f"`data.mix` names the sets {', '.join(names) or 'none'}, but a mixture is of two at least,"
                " each with a name of its own. One set alone is `data.train_file`."
            ]
        if None in weights and any(weights):
            return [
                f"`data.mix` gives {sum(each is not None for each in weights)} of {len(names)} sets a weight,"
                " but weights are relative to each other. Give each one, or none: then every row counts once."
            ]
        return []

    def _validation_problems(self) -> list[str]:
        if not 0 <= self.validation_frac < 1:
            return [
                f"`data.validation_frac` is {self.validation_frac}, but a share of the rows is from 0 (none)"
                " to below 1, such as 0.1."
            ]
        if self.validation_frac and self.validation_file:
            return [
                f"`data.validation_frac` is {self.validation_frac} and `data.validation_file` is"
                f" `{self.validation_file}`, but the rows for evaluation come from one of them. Leave"
                " validation_frac out, or add `data.validation_file=null`."
            ]
        return []

    def check_answers(self) -> None:
        """Check that the answers can be found, which questions alone do without.

        Raises:
            ConfigError: the column of the question is named, but not that of the answer.
        """
        if self.prompt_column and not self.response_column and self.layout != PREFERENCE:
            raise ConfigError(
                "`data.response_column` is not set, but the layout `columns` (chosen by `data.prompt_column`)"
                " needs both prompt_column and response_column. Set it to the name of the column."
            )

    @property
    def has_validation(self) -> bool:
        """Whether there are rows for evaluation: of a file, or kept from the training rows."""
        mixed = any(each.get("validation_file") for each in self.mix or ())
        return bool(self.validation_file) or self.validation_frac > 0 or mixed

    def file_of(self, split: str) -> str | list[str] | None:
        """Return what is given for a split: names of files, hub ids or shipped files; None where nothing is.

        Args:
            split: ``train``, ``validation`` (the training files, where rows of them are kept) or ``test``.
        """
        validation = self.validation_file or (self.train_file if self.validation_frac else None)
        return {"train": self.train_file, "validation": validation, "test": self.test_file}[split]

    def part_of_training_rows(self, split: str) -> str | None:
        """Return which part of the divided training rows a split is, None where it has rows of its own.

        Args:
            split: ``train``, ``validation`` or ``test``.
        """
        if not self.validation_frac or (split == "test" and self.test_file):
            return None
        return "train" if split == "train" else "validation"

    def max_samples_of(self, split: str) -> int | None:
        """Return how many rows of a split are used at most, None for all.

        Args:
            split: ``train``, ``validation`` or ``test``.
        """
        limits = {
            "train": self.max_train_samples,
            "validation": self.max_eval_samples,
            "test": self.max_predict_samples,
        }
        return limits[split]


def mixed_sets(settings: DataSettings) -> list[tuple[MixedSet, DataSettings]]:
    """Return the data sets of a mixture, each with the settings that its rows are read with.

    Args:
        settings: with ``mix``.

    Raises:
        ConfigError: a set is not described as it must be; all of its problems are reported.
    """
    found: list[tuple[MixedSet, DataSettings]] = []
    for number, values in enumerate(settings.mix or (), start=1):
        try:
            if not isinstance(values, Mapping):
                raise ConfigError(f"it must be a mapping of settings, but it is {values!r:.60}.")
            one = build_settings(MixedSet, values)
            own = {each.name: getattr(one, each.name) for each in fields(one) if each.name not in _OF_MIX}
            given = {name: value for name, value in own.items() if value is not None}
            frac = 0.0 if one.validation_file else settings.validation_frac
            found.append((one, replace(settings, mix=None, validation_frac=frac, **given)))
        except ConfigError as error:
            name = values.get("name") if isinstance(values, Mapping) else None
            raise ConfigError(f"`data.mix`, set {number} ({name or 'without a name'}): {error}") from None
    return found


_OF_MIX = ("name", "weight")
