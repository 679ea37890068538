"""Settings of a data set: where its rows are, how they are laid out, how long they may become."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.settings import check_choice, check_range, setting

SPLITS = ("train", "validation", "test")
LAYOUT_NAMES = ("auto", "columns", "adgen", "alpaca", "sharegpt", "openai")
LOSS_ON = ("answer", "all_turns", "everything")
ON_BAD_ROW = ("error", "skip")


@dataclass(frozen=True)
class DataSettings:
    """Where the rows are and how they become tokens."""

    name: str = setting("files", "named data set whose usual folders are searched, or `files` for own files")
    dir: str | None = setting(None, "folder of the files below; relative file names are looked up there")
    train_file: str | None = setting(
        None, "training rows: file, `owner/name[:split]` on the hub, `shipped:...`"
    )
    validation_file: str | None = setting(None, "rows for evaluation during training, named likewise")
    test_file: str | None = setting(None, "rows for prediction, named likewise")
    hub_subset: str | None = setting(None, "subset (configuration) of a hub data set")

    layout: str = setting("auto", "how a row is laid out: auto, columns, adgen, alpaca, sharegpt or openai")
    prompt_column: str | None = setting(None, "column of the question (layout columns)")
    response_column: str | None = setting(None, "column of the answer (layout columns)")
    history_column: str | None = setting(None, "column of earlier turns, a list of [question, answer] pairs")
    on_bad_row: str = setting(
        "error", "what an unusable row does: `error` stops, `skip` leaves it out and counts it"
    )

    source_prefix: str = setting("", "text put in front of every prompt")
    max_source_length: int = setting(
        64, "longest prompt, in tokens; oldest turns go first, then the question's end"
    )
    max_target_length: int = setting(128, "longest answer, in tokens, end token not counted")
    max_train_samples: int | None = setting(None, "use only the first rows of the training split")
    max_eval_samples: int | None = setting(None, "use only the first rows of the validation split")
    max_predict_samples: int | None = setting(None, "use only the first rows of the test split")

    loss_on: str = setting(
        "answer",
        "what is learnt: `answer` (the last one), `all_turns` (every answer) or `everything` (questions too)",
    )
    packing: bool = setting(
        False, "fill rows of `packing_length` with several samples that cannot see each other"
    )
    packing_length: int = setting(1024, "length of a packed row, in tokens")
    pad_to_multiple_of: int = setting(
        1, "round the padded length of a batch up to a multiple of this, in tokens"
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
        ):
            try:
                check_choice(path, value, valid)
            except ConfigError as error:
                problems.append(str(error))
        for name in ("max_source_length", "max_target_length", "packing_length", "pad_to_multiple_of",
                     "max_train_samples", "max_eval_samples", "max_predict_samples"):  # fmt: skip
            value = getattr(self, name)
            try:
                if value is not None:
                    check_range(f"data.{name}", value, low=1)
            except ConfigError as error:
                problems.append(str(error))
        problems += self._column_problems()
        longest = self.max_source_length + self.max_target_length + 1
        if self.packing and self.packing_length < longest:
            problems.append(
                f"`data.packing_length` is {self.packing_length}, but a packed row must hold the longest"
                f" sample: max_source_length {self.max_source_length} + max_target_length"
                f" {self.max_target_length} + 1 end token = {longest}. Raise packing_length to at least"
                f" {longest} or shorten the samples."
            )
        if problems:
            raise ConfigError("\n".join(problems))

    def _column_problems(self) -> list[str]:
        columns = {
            "prompt_column": self.prompt_column,
            "response_column": self.response_column,
            "history_column": self.history_column,
        }
        given = [name for name, value in columns.items() if value]
        named = " and ".join(f"`data.{name}`" for name in given)
        if given and self.layout not in ("auto", "columns"):
            return [
                f"{named} cannot be obeyed: `data.layout` is `{self.layout}`, whose columns are fixed. Use"
                " `data.layout=columns` (or auto), or leave the column names out."
            ]
        if (given or self.layout == "columns") and not (self.prompt_column and self.response_column):
            missing = [name for name in ("prompt_column", "response_column") if not columns[name]]
            return [
                f"`data.{missing[0]}` is not set, but the layout `columns`"
                + (f" (chosen by {named})" if given else "")
                + " needs both prompt_column and response_column. Set it to the name of the column."
            ]
        return []

    def file_of(self, split: str) -> str | None:
        """Return the file, hub id or shipped name given for a split, None where none is given.

        Args:
            split: ``train``, ``validation`` or ``test``.
        """
        return {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}[split]

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
