"""What a run keeps of retention, in ``RUN/retention/``.

base.jsonl          prompts and the base's answers (`glmtune.retention.base_answers`)
base.safetensors    the base's distributions along them (`glmtune.retention.distributions`)
step-N.jsonl        what the tuned model answered at step N, a line per prompt
exam/               the exam's questions answered by the base and by the tuned model
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedTokenizerBase

from glmtune.errors import CheckpointError
from glmtune.retention.base_answers import BaseAnswers, read_answers, write_answers
from glmtune.retention.distributions import BaseDistributions
from glmtune.retention.measure import TunedAnswer
from glmtune.storage.checksums import checked_line, with_checksum
from glmtune.storage.files import write_atomically, write_error, write_text_atomically

RETENTION = "retention"
"""Folder in a run folder."""
EXAM = "exam"
ANSWERS_FILE = "base.jsonl"
DISTRIBUTIONS_FILE = "base.safetensors"
FINGERPRINT = "fingerprint"


def write_base(run: Path, answers: BaseAnswers, distributions: BaseDistributions) -> None:
    """Keep what the base answered; the folder is made.

    Raises:
        GlmtuneError: the disk is full or the folder not writable.
    """
    folder = run / RETENTION
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"token_ids": distributions.token_ids, "log_probs": distributions.log_probs}
    content = save(tensors, metadata={FINGERPRINT: answers.fingerprint})
    file = folder / DISTRIBUTIONS_FILE
    try:
        write_atomically(file, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise write_error(file, error) from error
    write_answers(folder / ANSWERS_FILE, answers)


def read_base(run: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[BaseAnswers, BaseDistributions]:
    """Read what `write_base` kept.

    Args:
        run: the run folder.
        tokenizer: the model's.

    Raises:
        CheckpointError: a file is missing, damaged, or not of the other one's answers.
    """
    answers = read_answers(run / RETENTION / ANSWERS_FILE, tokenizer)
    file = run / RETENTION / DISTRIBUTIONS_FILE
    try:
        with safe_open(file, framework="pt") as held:
            found = (held.metadata() or {}).get(FINGERPRINT)
            distributions = BaseDistributions(held.get_tensor("token_ids"), held.get_tensor("log_probs"))
    except (OSError, SafetensorError) as error:
        raise _not_read(file, str(error)) from error
    num_tokens = sum(map(len, answers.answer_ids))
    if found != answers.fingerprint or len(distributions.log_probs) != num_tokens:
        raise _not_read(file, f"it is not of the answers in {ANSWERS_FILE}")
    return answers, distributions


def _not_read(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be used: {reason}. It holds what the base answered before tuning, which a run that "
        "goes on reads and never makes again. Restore it; or go on without measuring: `retention=null`."
    )


def write_step(run: Path, step: int, base: BaseAnswers, answers: Sequence[TunedAnswer]) -> None:
    """Keep what a tuned model answered, beside what its base did.

    Raises:
        GlmtuneError: the disk is full or the folder not writable.
    """
    rows = [
        {
            "prompt": base.prompts[answer.index].messages[-1].content,
            "category": base.prompts[answer.index].category,
            "language": base.prompts[answer.index].language,
            "base": base.texts[answer.index],
            "tuned": answer.text,
            "identical": answer.is_identical,
            "kl": answer.kl_nats,
            "leaks": answer.leaks,
            "switched_off": answer.is_off,
        }
        for answer in answers
    ]
    write_text_atomically(_step_file(run, step), "".join(with_checksum(row) for row in rows))


def read_step(run: Path, step: int) -> list[dict[str, Any]] | None:
    """Return what `write_step` kept, a row per prompt; None where that is missing or damaged.

    Reports are made of it, and a report must not fail a run that is finished.
    """
    try:
        content = _step_file(run, step).read_bytes()
        return [checked_line(line.decode("utf-8")) for line in content.split(b"\n") if line]
    except (OSError, ValueError):
        return None


def forget_later_steps(run: Path, step: int) -> None:
    """Remove what was answered after a step, which is about to be repeated, as the log's lines are."""
    for file in (run / RETENTION).glob("step-*.jsonl"):
        number = file.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            file.unlink(missing_ok=True)
    for folder in (run / RETENTION / EXAM).glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            shutil.rmtree(folder, ignore_errors=True)


def worst_rows(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Return the answers furthest from the base's: leaks first, then by their KL; none that is the base's.

    Args:
        rows: of `read_step`.
        count: most of them.
    """
    others = [row for row in rows if not row["identical"]]
    return sorted(others, key=lambda row: (not row["leaks"], -row["kl"]))[:count]


def _step_file(run: Path, step: int) -> Path:
    return run / RETENTION / f"step-{step}.jsonl"
