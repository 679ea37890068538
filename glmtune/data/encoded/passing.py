"""A split on its way through the processes that encode or measure it, with a bar that says how far it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

from glmtune.data.conversations import SplitReader
from glmtune.data.encoded.batches import BATCH_ROWS
from glmtune.data.encoded.workers import run_batches, usual_workers
from glmtune.data.records import Conversation
from glmtune.data.settings import DataSettings
from glmtune.models.templates.renderer import TextTokenizer

LARGE_BYTES = 16 << 20
"""Files above this in all are encoded by several processes and kept on disk, where nobody says otherwise.
Smaller ones take a second or two, about what it costs to start the processes."""


def is_large(reader: SplitReader) -> bool:
    """Say whether a split is large enough for several processes, and to be kept."""
    return reader.num_bytes >= LARGE_BYTES


def passed(
    task: str,
    reader: SplitReader,
    tokenizer: TextTokenizer,
    settings: DataSettings,
    title: str,
    progress: bool,
) -> Iterator[tuple[Sequence[Conversation], Any]]:
    """Pass a split through a task, batch by batch, in the order of the rows.

    Args:
        task: see `glmtune.data.encoded.workers.run_batches`.
        reader: of the split.
        tokenizer: a GLM tokenizer.
        settings: the data settings; ``num_workers`` says how many processes take part.
        title: of the progress bar.
        progress: whether to show one.

    Yields:
        Each batch with its result.
    """
    usual = usual_workers() if is_large(reader) else 1
    num_workers = settings.num_workers or usual
    with ExitStack() as held:
        shown = held.enter_context(_Progress(title, reader)).show if progress else None
        count = 0
        for batch, result in run_batches(
            task, _batches(reader, settings), tokenizer, settings, num_workers=num_workers
        ):
            count += len(batch)
            if shown is not None:
                shown(count)
            yield batch, result


def _batches(reader: SplitReader, settings: DataSettings) -> Iterator[tuple[Conversation, ...]]:
    conversations = iter(reader)
    while batch := tuple(islice(conversations, BATCH_ROWS)):
        # Nothing will come of the rows where one is refused; the others are read, to say all at once.
        if not (reader.has_bad and settings.on_bad_row == "error"):
            yield batch


class _Progress:
    """Shows how far a split is, of as many rows as its bytes let expect."""

    def __init__(self, title: str, reader: SplitReader) -> None:
        from glmtune.terminal.progress import Meter

        self._meter, self._reader = Meter(title, transient=True), reader

    def __enter__(self) -> _Progress:
        self._meter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._meter.__exit__(*error)

    def show(self, count: int) -> None:
        fraction = self._reader.fraction
        self._meter.update(count, total=max(count, round(count / fraction)) if fraction else None)
