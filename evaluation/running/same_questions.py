"""Which answers of an earlier run belong to the questions that are asked now.

A run may go on with more questions than it began with: a higher ``benchmark.limit``, more
``benchmark.subjects``. What is answered is not asked again, as every answer carries the hash of its prompt::

    there   law 0 .. 9                 answered to prompts that are the same now
    now     law 0 .. 19, art 0 .. 19   only law 10 .. 19 and art are asked
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.answer import TOO_LONG, Answer
from evaluation.backend import Backend
from evaluation.running.fingerprint import differ_in_questions_only
from evaluation.running.fitting import fit_prompt
from evaluation.running.run_files import IDENTITY_NAME, JOURNAL_PATTERN
from evaluation.running.run_folder import WAY_OUT, read_journals
from evaluation.task import Task, hash_prompt
from glmtune.errors import ConfigError, DataError
from glmtune.storage.journal import read_identity


class SameQuestions:
    """Holds answers against the questions of a task."""

    def __init__(self, task: Task, backend: Backend) -> None:
        """Take what is asked now.

        Args:
            task: the questions and their prompts.
            backend: counts tokens, where a question was too long to be asked.
        """
        self._task, self._backend = task, backend
        self._samples = {sample.key: sample for sample in task.samples}

    def is_asked(self, answer: Answer) -> bool:
        """Say whether an answer's question is among those asked now."""
        return answer.key in self._samples

    def is_same(self, answer: Answer) -> bool:
        """Say whether an answer's question would be asked by the same prompt now."""
        sample = self._samples[answer.key]
        if answer.prompt_hash:
            if answer.prompt_hash == hash_prompt(self._task.prompt(sample, answer.num_fewshot)):
                return True
            if self._task.prepared.shorten is None:
                return False
            fitted = fit_prompt(self._task, sample, self._backend).prompt  # its text may have been cut
            return fitted is not None and answer.prompt_hash == hash_prompt(fitted)
        return answer.stop_reason == TOO_LONG and fit_prompt(self._task, sample, self._backend).prompt is None

    def refuse_others(self, folder: Path, answers: Iterable[Answer]) -> None:
        """Refuse to go on where a folder holds answers to other questions than those asked now.

        Args:
            folder: of the run.
            answers: all that it holds.

        Raises:
            ConfigError: some are of questions that are not asked now, or of other prompts.
        """
        given = list(answers)
        if others := [answer for answer in given if not self.is_asked(answer)]:
            raise ConfigError(
                f"{folder / JOURNAL_PATTERN} holds {len(given):,} answers, of which {len(others):,} are to"
                f" questions that are not asked now (first: `{others[0].subject}` {others[0].index}). A run"
                " goes on with more questions (`benchmark.limit`, `benchmark.subjects`), not with fewer. To"
                f" score fewer of them, use `completions={folder}` and another `output_dir`. {WAY_OUT}"
            )
        if others := [answer for answer in given if not self.is_same(answer)]:
            raise ConfigError(
                f"{folder / JOURNAL_PATTERN} holds {len(given):,} answers, of which {len(others):,} are to"
                f" other prompts than now (first: `{others[0].subject}` {others[0].index}): the data or the"
                f" protocol has changed. {WAY_OUT}"
            )

    def answers_beside(
        self, folders: Sequence[Path], identity: Mapping[str, Any]
    ) -> Iterator[tuple[Path, Answer]]:
        """Yield what other runs of the same model, asked in the same way, have answered of the questions.

        Args:
            folders: of these runs; what cannot be read is passed over, as nobody asked for it.
            identity: of the run that is to go on with their answers.
        """
        for folder in folders:
            try:
                there = read_identity(folder / IDENTITY_NAME)
                if there is None or not differ_in_questions_only(there, identity):
                    continue
                answers = read_journals(folder)
            except (DataError, ValueError):
                continue
            for answer in answers.values():
                if self.is_asked(answer) and self.is_same(answer):
                    yield folder, answer
