"""What C-Eval and MMLU share: four options under a question, CSV rows, letters scored or extracted."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path

from evaluation.backend import Limits
from evaluation.benchmarks.benchmark import WAY_OUT, read_text
from evaluation.extraction import letters as letter_rules
from evaluation.fewshot import Exemplar, FewShot, as_text, turns_prompt
from evaluation.sample import ALPHABET, LETTERS, Prompt, Sample
from evaluation.task import CHOICES, GENERATE_THEN_CHOICES, SCORES, PreparedProtocol, Rule
from glmtune.errors import DataError

OFFICIAL = "official"
COT_TOKENS = 512
"""As in ChatGLM2's script for C-Eval."""
LETTER_RULES = {
    OFFICIAL: Rule("the most probable of the four letters", letter_rules.given, reads=SCORES),
}
TEXT_RULES = {
    "script": Rule("the C-Eval repository's regular expressions", letter_rules.script),
    "strict": Rule("the last sentence stating the answer in so many words", letter_rules.strict, version=2),
    "loose": Rule("what a careful reader finds", letter_rules.loose, version=2),
}


def block(sample: Sample) -> str:
    """Return question and options as all protocols write them: ``A. ...`` and so on, one per line."""
    options = zip(ALPHABET, sample.choices, strict=False)
    return sample.question + "".join(f"\n{letter}. {text}" for letter, text in options)


def csv_rows(path: Path, *, name: str, columns: int | None = None) -> list[list[str]]:
    """Read a CSV file, every cell as text, newlines included.

    Not with pandas: it takes the first row for a header (MMLU has none) and ``None`` for a missing value,
    which is an option of ten of MMLU's test questions.

    Args:
        path: the file; line ends may be LF or CRLF.
        name: of the benchmark.
        columns: cells that every row must have; None takes the number of the first row.

    Raises:
        DataError: the file is missing or a row has another number of cells.
    """
    reader = csv.reader(io.StringIO(read_text(path, name=name), newline=""))
    rows: list[list[str]] = []
    for row in _checked(reader, path, name):
        if not row:
            continue
        columns = columns or len(row)
        if len(row) != columns:
            raise DataError(
                f"{len(row)} cells, but every row must have {columns}. {WAY_OUT.format(name=name)}",
                path=path,
                line=reader.line_num,
            )
        rows.append(row)
    return rows


def own_csv_subjects(folder: Path, split: str, official: Container[str]) -> tuple[str, ...]:
    """Return the subjects of a folder that are not the benchmark's: a user's own questions in its layout.

    Args:
        folder: holds ``SUBJECT_SPLIT.csv``.
        split: of the files.
        official: the benchmark's subjects.
    """
    names = (path.stem.removesuffix(f"_{split}") for path in folder.glob(f"*_{split}.csv"))
    return tuple(sorted(name for name in names if name not in official))


def _checked(reader: Iterator[list[str]], path: Path, name: str) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:  # such as a cell above 128 KB, where a quote is not closed
        raise DataError(f"no CSV ({error}). {WAY_OUT.format(name=name)}", path=path) from None


def check_letter(answer: str, path: Path, row: int, *, name: str) -> None:
    """Raise DataError unless an answer is one of the letters A to D."""
    if len(answer) != 1 or answer not in LETTERS:
        raise DataError(
            f"the answer is {answer!r}, but it must be A, B, C or D. {WAY_OUT.format(name=name)}",
            path=path,
            line=row,
        )


def letter_protocol(
    shots: Mapping[str, list[Exemplar]],
    header: Callable[[str], str],
    ask: Callable[[Sample], str],
    *,
    is_chat: bool,
    choices: tuple[str, ...],
) -> PreparedProtocol:
    """Return the few-shot protocol that compares the probabilities of the letters after the cue.

    Args:
        shots: exemplars by subject, in file order; the last ones are lost first, as in hendrycks/test.
        header: subject to the line before the exemplars.
        ask: sample to its question with the cue.
        is_chat: whether exemplars become turns.
        choices: letters as they follow the cue.
    """

    def write(sample: Sample, num_fewshot: int) -> Prompt:
        kept = shots[sample.subject][:num_fewshot]
        if is_chat:
            return turns_prompt(header(sample.subject), kept, ask(sample))
        return Prompt(text=as_text(header(sample.subject), kept, ask(sample)), num_fewshot=len(kept))

    return PreparedProtocol(
        kind=CHOICES,
        rules=LETTER_RULES,
        write=write,
        limits=Limits(1),  # nothing is generated, but the scored token needs its place in the context
        choices=choices,
        num_fewshot=min(map(len, shots.values())),
        few_shot=FewShot(shots, ask),
    )


def two_stage_protocol(
    first: Callable[[Sample], Prompt],
    second: Callable[[Sample, str], Prompt],
    *,
    choices: tuple[str, ...],
) -> PreparedProtocol:
    """Return the protocol of two stages: reason freely, then compare the letters after a cue.

    Args:
        first: sample to the first prompt.
        second: sample and completion to the second prompt.
        choices: letters as they follow the second prompt.
    """
    return PreparedProtocol(
        kind=GENERATE_THEN_CHOICES,
        rules=LETTER_RULES | TEXT_RULES,
        write=lambda sample, num_fewshot: first(sample),
        limits=Limits(COT_TOKENS),
        choices=choices,
        write_extraction=second,
    )
