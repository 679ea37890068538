"""Questions that a backend could not answer, by name and reason, in a file beside each journal.

Not in the journal: what stands there is answered, and these are asked again when the run is next started.
The files are those of one launch: it begins without any.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluation.answer import Key
from glmtune.storage.files import write_error

FAILED_PATTERN = "failed-rank*.jsonl"


@dataclass(frozen=True, slots=True)
class FailedQuestion:
    """A question without an answer.

    Attributes:
        subject: of the sample.
        index: its row in the official file, from 0.
        reason: in words, on one line.
    """

    subject: str
    index: int
    reason: str

    @property
    def key(self) -> Key:
        """What names the sample: subject and index."""
        return (self.subject, self.index)


class FailureLog:
    """The file of one process; nothing is made before the first failure."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Name the file.

        Args:
            folder: of the run.
            rank: number of the process, from 0.
        """
        self.path = folder / FAILED_PATTERN.replace("*", str(rank))

    def append(self, failed: FailedQuestion) -> None:
        """Write one failure at the end, so that it is known even if the run is killed.

        Raises:
            GlmtuneError: the disk is full or the file not writable.
        """
        line = json.dumps(asdict(failed), ensure_ascii=False) + "\n"
        try:
            with self.path.open("ab") as file:
                file.write(line.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise write_error(self.path, error) from None


def read_failures(folder: Path) -> dict[Key, FailedQuestion]:
    """Read what failed in this launch; a line that is not whole is being written.

    Args:
        folder: of the run.
    """
    found: dict[Key, FailedQuestion] = {}
    for path in sorted(folder.glob(FAILED_PATTERN)):
        for line in path.read_bytes().split(b"\n"):
            try:
                failed = FailedQuestion(**json.loads(line))
            except (ValueError, TypeError):
                continue
            found[failed.key] = failed
    return found


def forget_failures(folder: Path) -> None:
    """Remove the failures of an earlier launch, whose questions are asked again.

    Raises:
        GlmtuneError: they cannot be removed.
    """
    for path in folder.glob(FAILED_PATTERN):
        try:
            path.unlink()
        except OSError as error:
            raise write_error(path, error) from None
