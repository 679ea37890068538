"""What a model does not get to see of its rows, in numbers: what is cut, not read, or left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from glmtune.data.reading.json_values import listed


class Shortened(Protocol):
    """A row or a prompt that was made to fit."""

    @property
    def dropped_turns(self) -> int:
        """Oldest turns left out."""
        ...

    @property
    def cut_question_tokens(self) -> int:
        """Tokens cut off the end of the question."""
        ...

    @property
    def cut_answer_tokens(self) -> int:
        """Tokens cut off the end of the answer."""
        ...


@dataclass(frozen=True, slots=True)
class TruncationCounts:
    """How many rows lost something, and how much.

    Attributes:
        rows_with_dropped_turns: rows whose oldest turns were left out.
        rows_with_cut_question: rows whose current question was cut at its end.
        rows_with_cut_answer: rows whose answer was cut at its end.
        dropped_turns: turns left out, over all rows.
        cut_question_tokens: question tokens cut, over all rows.
        cut_answer_tokens: answer tokens cut, over all rows.
    """

    rows_with_dropped_turns: int = 0
    rows_with_cut_question: int = 0
    rows_with_cut_answer: int = 0
    dropped_turns: int = 0
    cut_question_tokens: int = 0
    cut_answer_tokens: int = 0

    def words(self, num_rows: int, *, answers: str = "the answer's end") -> str:
        """Say what rows lose; "" where they lose nothing.

        Args:
            num_rows: of how many.
            answers: what is lost where an answer is cut.
        """
        losses = (
            (self.rows_with_dropped_turns, f"old turns ({self.dropped_turns:,} turns)"),
            (self.rows_with_cut_question, f"the question's end ({self.cut_question_tokens:,} tokens)"),
            (self.rows_with_cut_answer, f"{answers} ({self.cut_answer_tokens:,} tokens)"),
        )
        return ", ".join(
            f"{rows:,} ({100 * rows / max(1, num_rows):.1f} %) lose {what}" for rows, what in losses if rows
        )


def count_truncation(rows: Iterable[Shortened]) -> TruncationCounts:
    """Count what rows lost."""
    turns, questions, answers = [0, 0], [0, 0], [0, 0]
    for row in rows:
        for counts, amount in (
            (turns, row.dropped_turns),
            (questions, row.cut_question_tokens),
            (answers, row.cut_answer_tokens),
        ):
            counts[0] += amount > 0
            counts[1] += amount
    return TruncationCounts(turns[0], questions[0], answers[0], turns[1], questions[1], answers[1])


@dataclass(frozen=True, slots=True)
class Unseen:
    """What of a split does not reach the model.

    Attributes:
        num_rows: rows that do.
        truncation: what they lose.
        unused_columns: columns of the file, and keys of messages, that are not read.
        num_left_out: rows that cannot be used (``data.on_bad_row=skip``).
    """

    num_rows: int
    truncation: TruncationCounts
    unused_columns: tuple[str, ...]
    num_left_out: int = 0

    def line(self, *, answers: str = "the answer's end") -> str:
        """Say it in one line.

        Args:
            answers: what is lost where an answer is cut.
        """
        cut = self.truncation.words(self.num_rows, answers=answers)
        parts = [f"{self.num_rows:,} rows", f"cut: {cut}" if cut else "nothing cut"]
        if self.unused_columns:
            parts.append(f"not read: {len(self.unused_columns)} ({listed(self.unused_columns)})")
        if self.num_left_out:
            parts.append(f"left out: {self.num_left_out:,} rows that cannot be used")
        return "; ".join(parts)

    def values(self) -> dict[str, Any]:
        """Return it as plain values, for results."""
        return {
            "num_rows": self.num_rows,
            **asdict(self.truncation),
            "unused_columns": list(self.unused_columns),
            "rows_left_out": self.num_left_out,
        }


def unseen_of(values: Mapping[str, Any]) -> Unseen:
    """Read `Unseen.values` back."""
    names = TruncationCounts.__dataclass_fields__
    counts = TruncationCounts(**{name: values[name] for name in names})
    return Unseen(values["num_rows"], counts, tuple(values["unused_columns"]), values["rows_left_out"])
