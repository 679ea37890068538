"""Rows of files or the hub by number, encoded as they are asked for, one after the other.

A run of ``max_steps`` knows how many rows it will learn, so what it learns is a sequence of that length: the
rows of the files, drawn through the shuffle buffer, and again in another order when they are at their end. A
place in it is told by the pass and the rows drawn in that, which a checkpoint keeps: going on reads the files
once more up to there, without encoding, and draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from glmtune.data.conversations import with_system
from glmtune.data.encode import EncodedRow, encode_training_row, refuse_settings
from glmtune.data.reading.archives import archive_of
from glmtune.data.reading.readers import is_on_hub
from glmtune.data.reading.sources import described_files, find_data_files
from glmtune.data.reading.tables import FileReader
from glmtune.data.records import BadRow, RawRow, RowProblem, bad_rows_error
from glmtune.data.settings import DataSettings
from glmtune.data.streaming.shuffle import shuffled
from glmtune.data.truncation import Unseen, count_truncation
from glmtune.errors import DataError
from glmtune.models.templates.renderer import TextTokenizer, template_for

if TYPE_CHECKING:
    import datasets

SHUFFLE_BUFFER = 10_000
FIRST_ROWS = 256
"""Looked at before training, to tell what rows are like: whether they are conversations, what their answers
sound like."""
_PLACES_KEPT = 20_000
"""More than the rows of a step, whose beginning a checkpoint asks for."""
_ENDS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row of the stream is.

    Attributes:
        number: of the pass over the files, from 0.
        drawn: rows of the files drawn in that pass before it.
        rest: rows of the last one drawn that are still to come, as a conversation may give several.
    """

    number: int = 0
    drawn: int = 0
    rest: int = 0


class StreamedRows(Dataset[dict[str, Any]]):
    """The rows that a run learns, by number; asked for in rising order."""

    def __init__(
        self, settings: DataSettings, tokenizer: TextTokenizer, *, num_rows: int, seed: int, shuffle: bool
    ) -> None:
        """Find the files; none is read yet.

        Args:
            settings: the data settings, with lengths.
            tokenizer: a GLM tokenizer; it decides the template.
            num_rows: that the run learns in all.
            seed: of the draws.
            shuffle: draw rows through the buffer; without it they keep the order of the files.

        Raises:
            ConfigError: no file is given, or a setting that the model excludes.
            DataError: a file is nowhere.
        """
        refuse_settings(template_for(tokenizer), settings)
        self.settings, self._tokenizer, self._num_rows = settings, tokenizer, num_rows
        self._seed = seed
        self._buffer = (settings.shuffle_buffer or SHUFFLE_BUFFER) if shuffle else 1
        self.sources = find_data_files(settings, "train")
        self.bad: list[BadRow] = []
        self.is_chat = False
        self.truncation = count_truncation(())
        self.unused_columns: tuple[str, ...] = ()
        self._places: dict[int, Place] = {}
        self._ready: dict[int, EncodedRow] = {}
        self._next = 0
        self._rows = self._from(Place())

    def __len__(self) -> int:
        """Return how many rows the run learns."""
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``input_ids`` and ``labels`` of a row.

        Raises:
            DataError: a row on the way cannot be used (``on_bad_row="error"``), or a file cannot be read.
        """
        if index < self._next and index not in self._ready:  # gone through once more, after a rollback
            known = max((at for at in self._places if at <= index), default=0)
            self.seek(known, self._places.get(known, Place()))
        self._ready = {at: row for at, row in self._ready.items() if at >= index}
        self._advance(index + 1)
        row = self._ready[index]
        return {"input_ids": row.input_ids, "labels": row.labels}

    def place_of(self, index: int) -> dict[str, int]:
        """Return where a row is, as plain values: for a checkpoint, which `seek` then goes on from.

        Args:
            index: of a row among the last ones asked for, or behind them.
        """
        if index >= self._next:
            self._advance(index)
            return asdict(self._place)
        return asdict(self._places[index])

    def seek(self, index: int, place: Place) -> None:
        """Go on from a place, whatever was read before.

        Args:
            index: of the row there.
            place: see `Place`.
        """
        self._places, self._ready = {index: place}, {}
        self._next, self._rows = index, self._from(place)

    def _advance(self, end: int) -> None:
        """Make the rows up to a number ready."""
        while self._next < end:
            self._places[self._next] = self._place
            self._ready[self._next] = next(self._rows)
            self._next += 1
            if len(self._places) > 2 * _PLACES_KEPT:
                self._places = dict(list(self._places.items())[-_PLACES_KEPT:])

    def _from(self, place: Place) -> Iterator[EncodedRow]:
        """Yield rows from a place on, without end; `_place` is that of the next one."""
        self._place = place
        return self._endless(place)

    def _endless(self, start: Place) -> Iterator[EncodedRow]:
        number = start.number
        while True:
            skipped = start.drawn if number == start.number else 0
            count = 0
            for drawn, (file, raw) in enumerate(self._drawn(number), start=1):
                # Going on: rows drawn before are drawn again, as the buffer's state follows from them, and
                # dropped unencoded; of the last one `rest` encoded rows may still be due.
                if drawn < skipped or (drawn == skipped and not start.rest):
                    continue
                rows = self._encoded(file, raw)
                if drawn == skipped:
                    rows = rows[-start.rest :]
                count += len(rows)
                for place, row in enumerate(rows, start=1):
                    self._place = Place(number, drawn, len(rows) - place)
                    yield row
            # A whole pass without a row would be followed by another, for ever.
            if not count and not skipped:
                raise DataError(
                    "no row of it can be used. Correct the file, or name another.",
                    path=described_files(self.sources),
                )
            number += 1
            self._place = Place(number)

    def _drawn(self, number: int) -> Iterator[tuple[FileReader, RawRow]]:
        """Yield the rows of the files in the order of a pass, not yet converted."""
        return shuffled(self._read(), self._buffer, (self._seed, number))

    def _read(self) -> Iterator[tuple[FileReader, RawRow]]:
        left = self.settings.max_train_samples
        for source in self.sources:
            if left == 0:
                return
            file = FileReader(source, self.settings, "train", limit=left, need_answers=True)
            found = 0
            for raw in file.raw_rows():
                self._refuse(file)  # a line that is no row at all
                found += 1
                yield file, raw
            self._refuse(file)
            left = None if left is None else left - found

    def _encoded(self, file: FileReader, raw: RawRow) -> list[EncodedRow]:
        """Convert and encode a row; none where it cannot be used."""
        conversation = file.conversation(raw)
        self._refuse(file)
        self.unused_columns = tuple(dict.fromkeys((*self.unused_columns, *file.unused_columns)))
        if conversation is None:
            return []
        self.is_chat = self.is_chat or len(conversation.messages) > 1
        messages = with_system(conversation.messages, self.settings.system)
        try:
            rows = encode_training_row(
                self._tokenizer, replace(conversation, messages=messages), self.settings
            )
        except RowProblem as problem:
            file.bad.append(BadRow(raw.line, str(problem)))
            self._refuse(file)
            return []
        counts = count_truncation(rows)
        self.truncation = replace(
            self.truncation,
            **{name: value + getattr(self.truncation, name) for name, value in asdict(counts).items()},
        )
        return rows

    def _refuse(self, file: FileReader) -> None:
        if not file.bad:
            return
        if self.settings.on_bad_row == "error":
            raise bad_rows_error(file.path, file.bad, len(file.bad))
        self.bad += [replace(row, path=file.path) for row in file.bad]
        file.bad.clear()

    def fingerprint(self) -> str:
        """Identify the files without reading them: by size, and by what stands at their beginnings and ends.

        Raises:
            OSError: a file cannot be read.
        """
        digest = hashlib.sha256()
        for source in self.sources:
            if is_on_hub(source):
                digest.update(f"{source} {self.settings.hub_subset}\n".encode())
                continue
            path = archive_of(Path(source)) or Path(source)
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(f"{size}\n".encode() + file.read(_ENDS_BYTES))
                file.seek(max(0, size - _ENDS_BYTES))
                digest.update(file.read(_ENDS_BYTES))
        return digest.hexdigest()


@dataclass(frozen=True)
class StreamedSplit:
    """The training rows of a run that streams them; see `glmtune.data.dataset.EncodedSplit`.

    Attributes:
        stream: the rows by number.
        rows: the first of them, as a data set.
        settings: the data settings.
        fingerprint: see `StreamedRows.fingerprint`.
        is_chat: whether the first rows have questions.
    """

    stream: StreamedRows
    rows: datasets.Dataset
    settings: DataSettings
    fingerprint: str
    is_chat: bool
    split: str = "train"
    system: str | None = None

    @property
    def path(self) -> str:
        """The file or hub id; of several, the first and how many more."""
        return described_files(self.stream.sources)

    @property
    def lengths(self) -> range:
        """Stands for lengths, which nobody knows: of as many rows as the run learns."""
        return range(len(self.stream))

    @property
    def unseen(self) -> Unseen:
        """What of the rows read so far is not learnt from."""
        stream = self.stream
        return Unseen(len(stream), stream.truncation, stream.unused_columns, len(stream.bad))


def stream_split(
    settings: DataSettings, tokenizer: TextTokenizer, *, num_rows: int, seed: int, shuffle: bool
) -> StreamedSplit:
    """Prepare to stream the training rows: the first are read, and no other.

    Args:
        settings: the data settings, with lengths.
        tokenizer: a GLM tokenizer; it decides the template.
        num_rows: that the run learns in all.
        seed: of the draws.
        shuffle: see `StreamedRows`.

    Raises:
        ConfigError: no file is given.
        DataError: a file or its first rows cannot be used.
    """
    import datasets

    first = StreamedRows(settings, tokenizer, num_rows=FIRST_ROWS, seed=seed, shuffle=False)
    found = [first[number] for number in range(min(num_rows, FIRST_ROWS))]
    stream = StreamedRows(settings, tokenizer, num_rows=num_rows, seed=seed, shuffle=shuffle)
    return StreamedSplit(
        stream=stream,
        rows=datasets.Dataset.from_list(found),
        settings=settings,
        fingerprint=stream.fingerprint(),
        is_chat=first.is_chat,
        system=settings.system,
    )


def place_from(values: Mapping[str, Any]) -> Place:
    """Read `StreamedRows.place_of` back."""
    return Place(int(values["number"]), int(values["drawn"]), int(values["rest"]))
