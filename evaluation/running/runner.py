"""Ask every unanswered question of a task, keep each answer at once, and go on where a killed run stopped."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.answer import TOO_LONG, Answer, Key
from evaluation.backend import Backend, Limits
from evaluation.running.data_parallel import Processes
from evaluation.running.failed_questions import FailedQuestion, FailureLog, forget_failures, read_failures
from evaluation.running.fingerprint import deciding, fingerprint
from evaluation.running.fitting import Asked, fit_extraction, fit_prompt, limits_of
from evaluation.running.run_folder import (
    journal_path,
    lock_run,
    open_run,
    read_journals,
    refuse_other_run_of,
)
from evaluation.running.same_questions import SameQuestions
from evaluation.sample import Failure, Prompt, Sample
from evaluation.task import CHOICES, GENERATE, GENERATE_THEN_CHOICES, Task, hash_prompt
from glmtune.errors import GlmtuneError
from glmtune.storage.journal import Journal

CHUNK_SAMPLES = 256
"""Questions without common exemplars that are passed to the backend together.

Enough for it to sort by length and fill its batches; and a two-stage protocol scores after each piece, so
that a run that is stopped has most of its questions answered whole and not half.
"""
CHUNK_FEWSHOT_SAMPLES = 1024
"""The same for questions below exemplars: subjects are passed together up to so many.

More than without exemplars, as subjects are not divided, and most of them have 100 to 300 questions.
"""

Advance = Callable[[Sample, Answer | None], None]
"""Called after each complete answer, and with None where a question failed."""
StartProgress = Callable[[Sequence[Answer], int, tuple[str, ...]], Advance]
"""Called once, with the answers there, how many this process will add, and notes."""


@dataclass(frozen=True, slots=True)
class Finished:
    """All answers of a task.

    Attributes:
        answers: in the order of the task's samples.
        num_resumed: how many were there before this call.
        seconds: what this call took.
        notes: what a reader should be told, such as a dropped half line.
        failed: the questions that have no answer, in the order of the task's samples.
    """

    answers: tuple[Answer, ...]
    num_resumed: int
    seconds: float
    notes: tuple[str, ...]
    failed: tuple[FailedQuestion, ...] = ()


@dataclass(slots=True)
class _Session:
    """One process at work: what it asks, with which model, and where its answers go."""

    task: Task
    backend: Backend
    journal: Journal
    failures: FailureLog
    advance: Advance
    first_stages: dict[Key, Answer]
    last_time: float = field(default_factory=time.perf_counter)

    def keep(self, sample: Sample, answer: Answer) -> None:
        """Journal an answer with what each rule reads in it, and show progress once it is complete."""
        now = time.perf_counter()
        extracted = self.task.answers(sample, text=answer.completion, scores=answer.scores)
        answer = dataclasses.replace(answer, extracted=extracted, seconds=now - self.last_time)
        self.last_time = now
        self.journal.append(answer)
        if is_complete(self.task, answer):
            self.advance(sample, answer)

    def fail(self, sample: Sample, failure: Failure) -> None:
        """Note why a question has no answer; it is not scored."""
        self.failures.append(FailedQuestion(sample.subject, sample.index, failure.reason))
        self.advance(sample, None)


def run_task(
    task: Task,
    backend: Backend,
    folder: Path,
    *,
    resume: bool = True,
    processes: Processes | None = None,
    progress: StartProgress | None = None,
    beside: Sequence[Path] = (),
) -> Finished | None:
    """Answer the questions of a task that have no answer in a folder yet.

    Args:
        task: what to ask.
        backend: whom to ask.
        folder: of the run; gets one journal per process.
        resume: see ``evaluation.running.run_folder.open_run``.
        processes: this process among those that share the run; one alone by default.
        progress: shows how far the run is; None shows nothing.
        beside: folders of other runs; what they have answered of the questions, for the same model asked in
            the same way, is taken over.

    Returns:
        All answers; None in processes other than the first.

    Raises:
        GlmtuneError: the folder holds another run or cannot be written, the backend fails, or no question got
            an answer; answers stay.
    """
    processes = processes or Processes()
    identity = deciding(fingerprint(task, backend.identity, backend.max_context_tokens))
    known: dict[Key, Answer] = {}
    notes: tuple[str, ...] = ()
    journal: Journal | None = None
    began = time.perf_counter()
    with ExitStack() as held:

        def unanswered() -> list[Key]:
            """Open the run, in rank 0 alone, which holds its journal from here to the end."""
            nonlocal journal, notes
            journal = held.enter_context(lock_run(folder))
            same = SameQuestions(task, backend)
            opened = open_run(journal, identity, resume=resume, refuse_others=same.refuse_others)
            forget_failures(folder)
            known.update(opened.answers)
            taken = _take_over(task, journal, known, same.answers_beside(beside if resume else (), identity))
            notes = (*opened.notes, *taken)
            return [sample.key for sample in task.samples if not _has(task, known, sample.key)]

        share = set(processes.share(folder, unanswered))
        if journal is None:
            # Rank 0 has opened the run for its model; what this process would add must be of the same.
            refuse_other_run_of(folder, identity)
            journal = held.enter_context(Journal(journal_path(folder, processes.rank)))
            known.update(read_journals(folder))
        done = [known[sample.key] for sample in task.samples if _has(task, known, sample.key)]
        advance = progress(done, len(share), notes) if progress is not None else lambda sample, answer: None
        session = _Session(task, backend, journal, FailureLog(folder, processes.rank), advance, known)
        _ask_all(session, [sample for sample in task.samples if sample.key in share])
        if processes.rank:
            return None

        failed: dict[Key, FailedQuestion] = {}

        def settled() -> set[Key]:
            """Return what is answered or has failed."""
            failed.update(read_failures(folder))
            known.update(read_journals(folder))
            return {key for key in known if _has(task, known, key)} | failed.keys()

        settled()  # what is there by now may be all, and one process has nobody to wait for
        processes.wait_for_answers([sample.key for sample in task.samples], settled)
    keys = [sample.key for sample in task.samples]
    answers = tuple(known[key] for key in keys if _has(task, known, key))
    lost = tuple(failed[key] for key in keys if not _has(task, known, key))
    if not answers:
        raise GlmtuneError(
            f"None of the {len(keys)} questions of {task.title} got an answer. The first,"
            f" `{lost[0].subject}` {lost[0].index}: {lost[0].reason}"
        )
    return Finished(answers, len(done), time.perf_counter() - began, notes, lost)


def is_complete(task: Task, answer: Answer) -> bool:
    """Say whether an answer has everything its protocol needs (a two-stage answer may lack its second stage).

    Args:
        task: the protocol.
        answer: finished or not.
    """
    if answer.stop_reason == TOO_LONG:
        return True
    has_text, has_scores = answer.completion is not None, answer.choice_logprobs is not None
    return {GENERATE: has_text, CHOICES: has_scores, GENERATE_THEN_CHOICES: has_text and has_scores}[
        task.kind
    ]


def _take_over(
    task: Task, journal: Journal, known: dict[Key, Answer], beside: Iterable[tuple[Path, Answer]]
) -> list[str]:
    """Write answers of other runs into a run that lacks them, and return what is to be said of it."""
    taken: dict[Path, int] = {}
    for folder, answer in beside:
        if not _has(task, known, answer.key) and is_complete(task, answer):
            journal.append(answer)
            known[answer.key] = answer
            taken[folder] = taken.get(folder, 0) + 1
    return [f"{count:,} answers are taken over from {folder}." for folder, count in taken.items()]


def _has(task: Task, known: dict[Key, Answer], key: Key) -> bool:
    return key in known and is_complete(task, known[key])


def _ask_all(session: _Session, samples: Sequence[Sample]) -> None:
    for batch in _batches(session.task, samples):
        asked = [fit_prompt(session.task, sample, session.backend) for sample in batch]
        for each in asked:
            if each.prompt is None:
                session.keep(each.sample, _too_long(each.sample))
        asked = [each for each in asked if each.prompt is not None]
        if session.task.kind == CHOICES:
            for each, answer in _score(session, [(item, _prompt(item)) for item in asked]):
                session.keep(each.sample, answer)
            continue
        finished = _first_stage(session, asked)
        if session.task.kind == GENERATE_THEN_CHOICES:
            _second_stage(session, asked, finished)


def _batches(task: Task, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Yield questions to pass together: whole subjects where exemplars are shared, else pieces of the whole.

    A backend reads what the prompts of one call begin with once, so a subject is never divided, nor are those
    that have the same exemplars; and it fills the places of rows that end, which the next call could not.
    """
    if not task.num_fewshot:
        for start in range(0, len(samples), CHUNK_SAMPLES):
            yield list(samples[start : start + CHUNK_SAMPLES])
        return
    batch: list[Sample] = []
    for group in _by_exemplars(task, samples):
        if batch and len(batch) + len(group) > CHUNK_FEWSHOT_SAMPLES:
            yield batch
            batch = []
        batch = [*batch, *group]
    if batch:
        yield batch


def _by_exemplars(task: Task, samples: Sequence[Sample]) -> Iterable[list[Sample]]:
    """Group questions by what stands above them, in the order in which that occurs first."""
    few_shot = task.prepared.few_shot
    groups: dict[object, list[Sample]] = {}
    for sample in samples:
        shown = None if few_shot is None else few_shot.exemplars.get(sample.subject)
        same = sample.subject if shown is None else tuple(shown[: task.num_fewshot])
        groups.setdefault(same, []).append(sample)
    return groups.values()


def _first_stage(session: _Session, asked: Sequence[Asked]) -> dict[Key, Answer]:
    """Generate what is not there yet, journalled at once.

    Returns:
        The first stage of every question that has one, those of an earlier launch included.
    """
    done = {each.sample.key: session.first_stages.get(each.sample.key) for each in asked}
    finished = {key: answer for key, answer in done.items() if answer is not None}
    waiting = [each for each in asked if each.sample.key not in finished]
    # A call has one limit for all its prompts, and long questions have less room to generate.
    by_limits: dict[Limits, list[Asked]] = {}
    for each in waiting:
        by_limits.setdefault(limits_of(session.task, each), []).append(each)
    for limits, group in by_limits.items():
        prompts = [_drawn_by(_prompt(each), each.sample, limits) for each in group]
        for place, completion in session.backend.generate(prompts, limits):
            sample, prompt = group[place].sample, prompts[place]
            if isinstance(completion, Failure):
                session.fail(sample, completion)
                continue
            answer = Answer(
                sample.subject,
                sample.index,
                prompt_hash=hash_prompt(prompt),
                completion=completion.text,
                stop_reason=completion.stop_reason,
                num_prompt_tokens=completion.num_prompt_tokens,
                num_new_tokens=completion.num_new_tokens,
                num_fewshot=prompt.num_fewshot,
            )
            finished[sample.key] = answer
            session.keep(sample, answer)
    return finished


def _second_stage(session: _Session, asked: Sequence[Asked], finished: dict[Key, Answer]) -> None:
    """Score the choices after each completion's extraction prompt."""
    pairs: list[tuple[Asked, Prompt]] = []
    for each in asked:
        first = finished.get(each.sample.key)
        if first is None:  # it failed
            continue
        prompt = fit_extraction(session.task, each.sample, first.completion or "", session.backend)
        if prompt is None:
            session.keep(each.sample, dataclasses.replace(first, stop_reason=TOO_LONG))
        else:
            pairs.append((each, prompt))
    for each, scored in _score(session, pairs):
        first = finished[each.sample.key]
        session.keep(each.sample, dataclasses.replace(first, choice_logprobs=scored.choice_logprobs))


def _score(session: _Session, pairs: Sequence[tuple[Asked, Prompt]]) -> Iterable[tuple[Asked, Answer]]:
    prompts = [prompt for _, prompt in pairs]
    if not prompts:
        return
    for place, scores in session.backend.score_choices(prompts, session.task.choices):
        sample, prompt = pairs[place][0].sample, prompts[place]
        if isinstance(scores, Failure):
            session.fail(sample, scores)
            continue
        yield (
            pairs[place][0],
            Answer(
                sample.subject,
                sample.index,
                prompt_hash=hash_prompt(prompt),
                choice_logprobs=scores.logprobs,
                num_prompt_tokens=scores.num_prompt_tokens,
                num_fewshot=prompt.num_fewshot,
            ),
        )


def _prompt(asked: Asked) -> Prompt:
    assert asked.prompt is not None
    return asked.prompt


def _drawn_by(prompt: Prompt, sample: Sample, limits: Limits) -> Prompt:
    """Give a prompt the seed of its answer, where answers are drawn."""
    if limits.drawing is None:
        return prompt
    return dataclasses.replace(prompt, seed=limits.drawing.seed_of(*sample.key))


def _too_long(sample: Sample) -> Answer:
    return Answer(sample.subject, sample.index, stop_reason=TOO_LONG)
