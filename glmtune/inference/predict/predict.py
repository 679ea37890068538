"""Answer all questions of a split, keep each answer on disk at once, and score them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glmtune.inference.engine.model import Drafting
from glmtune.inference.predict.generate import generate_completions
from glmtune.inference.predict.predictions import Prediction
from glmtune.inference.predict.questions import Question
from glmtune.inference.predict.run_identity import RESULTS_NAME, RunIdentity, answered_rows
from glmtune.inference.settings import GenerationSettings
from glmtune.metrics.summary import TextReport, summarize
from glmtune.metrics.text import RowScores, score_row
from glmtune.storage.files import json_text, write_text_atomically
from glmtune.storage.journal import Journal
from glmtune.terminal.progress import Meter


@dataclass(frozen=True, slots=True)
class LookedUp:
    """What came of drafts, summed over the rows that this call answered.

    Attributes:
        num_new_tokens: of their answers, end tokens included.
        num_draft_tokens: drafted, and computed.
        num_accepted_tokens: of these, what the model chose anyway: so many passes were saved.
    """

    num_new_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def line(self) -> str:
        """The figures in words; empty where nothing was drafted."""
        if not self.num_draft_tokens:
            return ""
        accepted, share = self.num_accepted_tokens, 100 * self.num_accepted_tokens / self.num_draft_tokens
        of_new = 100 * accepted / max(1, self.num_new_tokens)
        return (
            f"drafts: {accepted:,} of {self.num_draft_tokens:,} drafted tokens were right"
            f" ({share:.0f} %), {of_new:.0f} % of the {self.num_new_tokens:,} new tokens"
        )


@dataclass(frozen=True, slots=True)
class PredictedSplit:
    """All answers of a split.

    Attributes:
        folder: where they are.
        predictions: in the order of the data.
        scores: of each row; empty if some row has no reference.
        report: the scores over all rows; None if some row has no reference.
        num_resumed: rows that were there before this call.
        seconds: time this call took for the others.
        looked_up: what came of drafts in it.
    """

    folder: Path
    predictions: tuple[Prediction, ...]
    scores: tuple[RowScores, ...]
    report: TextReport | None
    num_resumed: int
    seconds: float
    looked_up: LookedUp = LookedUp(0, 0, 0)


def predict_split(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    settings: GenerationSettings,
    *,
    journal: Journal,
    identity: RunIdentity,
    resume: str = "auto",
    facts: Mapping[str, Any] | None = None,
    progress: bool = False,
    draft: Drafting | None = None,
) -> PredictedSplit:
    """Answer the questions that have no answer in the journal yet.

    Args:
        model: the model, its prefix attached if there is one.
        tokenizer: its tokenizer.
        questions: all of them.
        settings: how to generate.
        journal: of the run, see ``open_journal``; ``predict_results.json`` is written beside it.
        identity: of this run.
        resume: ``auto`` or ``never``, see ``answered_rows``.
        facts: what else ``predict_results.json`` says.
        progress: show it, on standard error.
        draft: see `generate_ids`.

    Returns:
        The answers and their scores.

    Raises:
        ConfigError: see ``answered_rows`` and ``generate_ids``.
    """
    folder = journal.path.parent
    done = {row.row: row for row in answered_rows(journal, identity, resume=resume)}
    num_resumed = len(done)
    waiting = [question for question in questions if question.row not in done]
    began = time.perf_counter()
    fresh: dict[int, RowScores | None] = {}
    counts = Counter[str]()
    meter = Meter(folder.name, total=len(questions), done=num_resumed) if progress and waiting else None
    with meter or nullcontext():
        for prediction, scored in _answer(model, tokenizer, waiting, settings, counts, draft):
            journal.append(prediction)
            done[prediction.row], fresh[prediction.row] = prediction, scored
            if meter is not None:
                meter.update(len(done), tokens=prediction.num_new_tokens)
    seconds = time.perf_counter() - began
    predictions = tuple(done[question.row] for question in questions)
    # Answers come as they end, longest prompts first; the finished file has the order of the data.
    journal.rewrite(predictions)
    complete = all(each.reference is not None for each in predictions)
    scores = tuple(
        fresh.get(each.row) or score_row(each.prediction, each.reference or "")
        for each in (predictions if complete else ())
    )
    split = PredictedSplit(
        folder,
        predictions,
        scores,
        summarize(scores) if scores else None,
        num_resumed,
        seconds,
        LookedUp(counts["new"], counts["draft"], counts["accepted"]),
    )
    write_text_atomically(folder / RESULTS_NAME, json_text({**split_results_json(split), **(facts or {})}))
    return split


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    settings: GenerationSettings,
    counts: Counter[str],
    draft: Drafting | None,
) -> Iterator[tuple[Prediction, RowScores | None]]:
    """Answer and score questions as they finish; None where there is no reference to score against."""
    answers = generate_completions(
        model,
        tokenizer,
        [question.input_ids for question in questions],
        settings,
        rows=[question.row for question in questions],
        draft=draft,
    )
    for answer in answers:
        question = questions[answer.index]
        counts.update(
            new=answer.num_new_tokens, draft=answer.num_draft_tokens, accepted=answer.num_accepted_tokens
        )
        scored = None if question.reference is None else score_row(answer.text, question.reference)
        prediction = Prediction(
            row=question.row,
            prediction=answer.text,
            reference=question.reference,
            prompt=question.prompt,
            stop_reason=answer.stop_reason,
            num_new_tokens=answer.num_new_tokens,
            is_tuned=answer.is_tuned,
            full_reference=question.full_reference,
            thoughts=answer.thoughts,
            scores=None if scored is None else scored.named(),
        )
        yield prediction, scored


def split_results_json(split: PredictedSplit) -> dict[str, Any]:
    """Return the metrics file of a split: the official keys first, then every figure with its interval.

    Args:
        split: what was predicted.
    """
    num_new = len(split.predictions) - split.num_resumed
    values: dict[str, Any] = {}
    if split.report is not None:
        official = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
        values = {f"predict_{name}": round(split.report[name].value, 4) for name in official}
    values |= {
        "predict_samples": len(split.predictions),
        "predict_runtime": round(split.seconds, 3),
        "predict_samples_per_second": round(num_new / split.seconds, 3) if split.seconds else 0.0,
        "num_resumed": split.num_resumed,
        "num_stopped_by_length": sum(each.stop_reason == "length" for each in split.predictions),
    }
    if (looked_up := split.looked_up).num_draft_tokens:
        values |= {
            "num_draft_tokens": looked_up.num_draft_tokens,
            "num_accepted_tokens": looked_up.num_accepted_tokens,
            "num_new_tokens": looked_up.num_new_tokens,
        }
    if any(each.is_tuned is not None for each in split.predictions):
        values["num_switched_off"] = sum(each.is_tuned is False for each in split.predictions)
    return values if split.report is None else {**values, **split.report.to_json()}
