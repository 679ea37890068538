"""Replay: which general rows a step takes, what they add to it, and that a run goes on with them exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from glmtune.errors import CheckpointError, ConfigError, DataError
from glmtune.loading import load_tokenizer
from glmtune.messages import Message
from glmtune.models.load import load_official
from glmtune.retention.base_answers import BaseAnswers
from glmtune.retention.own_prompts import sample_prompts, turn_of_user
from glmtune.retention.prompts import Prompt
from glmtune.retention.replay import Replay
from glmtune.retention.settings import RETAIN_FILE, RetainSettings
from glmtune.training.checkpoints.folder import read_manifest
from glmtune.training.config import RunConfig
from glmtune.training.log import read_log
from glmtune.training.session import train
from glmtune.training.starting import base_answers
from glmtune.training.tracking.header import header
from glmtune.training.trainer import GlmTrainer

MakeTrainer = Callable[..., GlmTrainer]
QUESTIONS = ("你好", "How many apples are left?", "这条裙子颜色很白。", "1 + 2 =", "写一段广告。")


@pytest.fixture
def retain(tmp_path: Path) -> Callable[..., RetainSettings]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in QUESTIONS), encoding="utf-8")
    return lambda **values: RetainSettings(**{"prompts": str(file), "max_new_tokens": 8, **values})


@pytest.mark.parametrize("is_there", [True, False], ids=["there", "missing"])
def test_all_processes_ask_one_whether_to_keep_the_answers(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looked by himself might find what the first process has just written, and leave it alone."""
    asked: list[Callable[[], None]] = []
    written: list[Path] = []
    monkeypatch.setattr(base_answers.collectives, "broadcast_from_main", asked.append)
    monkeypatch.setattr(base_answers, "write_answers", lambda file, answers: written.append(file))
    start = object.__new__(base_answers.ReplayStart)
    start._trainer = cast(Any, SimpleNamespace(run_folder=tmp_path))
    start._replay = cast(Any, SimpleNamespace(answers=ANSWERS))
    file = tmp_path / RETAIN_FILE
    if is_there:
        file.parent.mkdir()
        file.write_text("as it was")
    start.on_train_begin(cast(Any, None), cast(Any, SimpleNamespace(global_step=4)), cast(Any, None))
    [keep] = asked
    keep()
    assert written == ([] if is_there else [file])


# ---- which rows

NUM_ANSWERS = 10
ANSWERS = BaseAnswers(
    [[100 + row] * (row + 1) for row in range(NUM_ANSWERS)],
    [[200 + row] * (row + 2) for row in range(NUM_ANSWERS)],
    [Prompt((Message("user", str(row)),)) for row in range(NUM_ANSWERS)],
    [""] * NUM_ANSWERS,
)


def planned(rows: int, *, accumulation: int, num_processes: int = 1, rank: int = 0, seed: int = 3) -> Replay:
    replay = Replay(
        RetainSettings(rows=rows),
        rows_per_step=16,
        accumulation=accumulation,
        seed=seed,
        tokenizer=cast(Any, SimpleNamespace(pad_token_id=0)),
        rank=rank,
        num_processes=num_processes,
    )
    replay.answers = ANSWERS
    return replay


def batches(replay: Replay, step: int, num_batches: int) -> list[Any]:
    replay.begin_step(step, num_batches)
    return [replay.next_batch() for _ in range(num_batches)]


def rows_in(batch: Any) -> list[int]:
    """Return the rows that a batch learns; labels are 200 and more."""
    if batch is None:
        return []
    return [int(row.max()) - 200 for row in batch["labels"] if int(row.max()) >= 0]


def test_a_quarter_of_the_tasks_rows_unless_said_otherwise() -> None:
    assert [RetainSettings().rows_of(count) for count in (1, 4, 16, 18)] == [1, 1, 4, 4]
    assert RetainSettings(rows=9).rows_of(16) == 9


def test_rows_are_spread_over_the_micro_batches_one_by_one() -> None:
    found = [rows_in(batch) for batch in batches(planned(4, accumulation=16), 0, 16)]
    assert [len(rows) for rows in found] == [1, 0, 0, 0] * 4
    assert [len(rows_in(batch)) for batch in batches(planned(5, accumulation=2), 0, 2)] == [3, 2]


def test_every_row_comes_once_before_any_comes_again() -> None:
    replay = planned(4, accumulation=2)
    taken = [row for step in range(5) for batch in batches(replay, step, 2) for row in rows_in(batch)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]


def test_a_step_takes_the_same_rows_however_it_is_come_to_and_shared_out() -> None:
    alone = planned(6, accumulation=4)
    for step in range(3):
        batches(alone, step, 4)
    expected = sorted(alone.rows_of_step)
    for count in (2, 3):
        shares = [planned(6, accumulation=4, num_processes=count, rank=rank) for rank in range(count)]
        found = [row for each in shares for batch in batches(each, 2, 4) for row in rows_in(batch)]
        assert sorted(found) == expected
    other = planned(6, accumulation=4, seed=4)
    batches(other, 2, 4)
    assert sorted(other.rows_of_step) != expected


def test_all_processes_make_the_same_passes() -> None:
    shares = [planned(5, accumulation=4, num_processes=2, rank=rank) for rank in (0, 1)]
    made = [batches(each, 0, 4) for each in shares]
    assert [[batch is not None for batch in each] for each in made] == [[True, True, True, False]] * 2
    assert [[len(rows_in(batch)) for batch in each] for each in made] == [[1, 1, 1, 0], [1, 1, 0, 0]]
    filler = made[1][2]
    assert filler["input_ids"].shape[1] > 0
    assert shares[1].num_tokens == 0


def test_a_short_step_counts_the_labels_it_has() -> None:
    replay = planned(4, accumulation=4)
    replay.begin_step(0, 2)
    assert len(replay.rows_of_step) == 2
    assert replay._num_labels == sum(row + 2 for row in replay.rows_of_step)


def test_only_the_answer_is_learnt() -> None:
    replay = planned(1, accumulation=1)
    (batch,) = batches(replay, 0, 1)
    (row,) = replay.rows_of_step
    assert batch["input_ids"].tolist() == [[100 + row] * (row + 1) + [200 + row] * (row + 2)]
    assert batch["labels"].tolist() == [[-100] * (row + 1) + [200 + row] * (row + 2)]


# ---- in training


def numbers(trainer: GlmTrainer, *names: str) -> list[tuple[float, ...]]:
    return [tuple(entry[name] for name in names) for entry in read_log(trainer.run_folder) if "loss" in entry]


LOGGED = ("step", "loss", "retain_loss", "grad_norm", "tokens")


@pytest.mark.parametrize("loss", ["answers", "kl"])
def test_a_run_that_goes_on_repeats_one_never_stopped(make_trainer: MakeTrainer, retain, loss: str) -> None:
    values = {"retain": retain(loss=loss), "max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2}
    # A line of the log every three steps, so that a checkpoint falls between two.
    whole = make_trainer(folder="whole", logging_steps=3, **values)
    train(whole, None)
    stopped = whole.run_folder.with_name("stopped")
    shutil.copytree(whole.run_folder, stopped)
    shutil.rmtree(stopped / "checkpoint-4")
    again = make_trainer(folder="stopped", logging_steps=3, **values)
    train(again, stopped / "checkpoint-2")
    assert numbers(again, *LOGGED) == numbers(whole, *LOGGED) != []
    one, other = (each.tuned.model.state_dict() for each in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_step_is_watched_by_its_sum_and_logged_by_its_parts(make_trainer: MakeTrainer, retain) -> None:
    trainer = make_trainer(retain=retain(weight=3.0), max_steps=2)
    train(trainer, None)
    sums = [loss + 3 * general for loss, general in numbers(trainer, "loss", "retain_loss")]
    assert [loss for _, loss in trainer.watch.losses] == pytest.approx(sums, rel=1e-6)
    assert dict(header(trainer, SETTINGS))["replay"].startswith("1 general rows a step: the base's answers")


SETTINGS: dict[str, Any] = {
    "model": {"source": "tiny"},
    "data": {"train_file": "rows"},
    "tune": "prefix",
    "prefix": {"pre_seq_len": 4},
}


def test_a_general_row_that_is_not_finite_stops_the_run_and_is_named(
    make_trainer: MakeTrainer, retain
) -> None:
    trainer = make_trainer(retain=retain(weight=float("inf")))
    with pytest.raises(
        Exception, match=r"loss of step 1 is not finite.*general rows in `retention/retain\.jsonl`: \d"
    ):
        train(trainer, None)


def test_checkpointing_and_codes_change_nothing_but_the_last_digits(
    make_trainer: MakeTrainer, retain
) -> None:
    plain = make_trainer(folder="plain", retain=retain(), max_steps=2)
    kept = make_trainer(folder="kept", retain=retain(), max_steps=2, gradient_checkpointing=True)
    coded = make_trainer(folder="coded", retain=retain(loss="kl"), method="int8", max_steps=2)
    for trainer in (plain, kept, coded):
        train(trainer, None)
    expected = numbers(plain, "loss", "retain_loss")
    assert [x for row in numbers(kept, "loss", "retain_loss") for x in row] == pytest.approx(
        [x for row in expected for x in row], rel=1e-5
    )
    # A quantized base answers as itself: near the one it was made of, and never bit by bit the same.
    assert coded.fingerprints["retain_fingerprint"] != ""
    assert all(0 < general < 5 for _, general in numbers(coded, "loss", "retain_loss"))


# ---- the answers


def test_answers_are_kept_and_their_fingerprint_is_a_fact(make_trainer: MakeTrainer, retain) -> None:
    trainer = make_trainer(retain=retain(), max_steps=2, save_steps=1)
    torch.manual_seed(5)
    train(trainer, None)
    assert trainer.replay is not None
    assert trainer.replay.answers is not None
    assert [each.messages[0].content for each in trainer.replay.answers.prompts] == list(QUESTIONS)
    manifest = read_manifest(trainer.run_folder / "checkpoint-2") or {}
    assert manifest["retain_fingerprint"] == trainer.replay.answers.fingerprint

    file = trainer.run_folder / "retention" / "retain.jsonl"
    content = file.read_text(encoding="utf-8")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"retain\.jsonl is absent"):
        train(make_trainer(retain=retain(), max_steps=3), trainer.run_folder / "checkpoint-2")
    other = make_trainer(folder="other", retain=retain(max_new_tokens=3), max_steps=1)
    train(other, None)
    shutil.copy(other.run_folder / "retention" / "retain.jsonl", file)
    with pytest.raises(ConfigError, match=r"another retain fingerprint"):
        train(make_trainer(retain=retain(), max_steps=3), trainer.run_folder / "checkpoint-2")
    file.write_text(content, encoding="utf-8")
    train(make_trainer(folder="branch", retain=retain(), max_steps=3), trainer.run_folder / "checkpoint-2")
    assert (trainer.run_folder.with_name("branch") / "retention" / "retain.jsonl").read_text(
        "utf-8"
    ) == content


def test_a_file_of_prompts_that_is_absent_ends_the_run_before_anything_is_written(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(retain=RetainSettings(prompts=str(tmp_path / "absent.jsonl")))
    with pytest.raises(DataError, match=r"absent\.jsonl: there is no such file \(`retain\.prompts`\)"):
        train(trainer, None)
    assert list(trainer.run_folder.iterdir()) == []


def test_prompts_that_the_base_thinks_up(tiny_base: Path, tiny_chatglm3_tokenizer: Any, monkeypatch) -> None:
    model, tokenizer = load_official(tiny_base, device="cpu"), load_tokenizer(tiny_base)
    opening, closing = turn_of_user(tokenizer)
    assert tokenizer.decode(opening) == "[Round 1]\n\n问："
    assert tokenizer.decode(closing).strip() == "答："
    assert turn_of_user(tiny_chatglm3_tokenizer)[1][-1] == tiny_chatglm3_tokenizer.get_command(
        "<|assistant|>"
    )
    # Random weights end few turns; what counts is that all that is left has ended, once each.
    monkeypatch.setattr("glmtune.retention.own_prompts.FEWEST", 1)
    before = torch.get_rng_state()
    found = sample_prompts(model, tokenizer, seed=3, num_sampled=96)
    assert torch.equal(torch.get_rng_state(), before)
    texts = [prompt.messages[0].content for prompt in found]
    assert len(set(texts)) == len(texts) > 0
    assert all(text == text.strip() != "" for text in texts)
    assert sample_prompts(model, tokenizer, seed=3, num_sampled=96) == found
    assert sample_prompts(model, tokenizer, seed=4, num_sampled=96) != found


def test_too_few_prompts_of_its_own_are_refused(tiny_base: Path) -> None:
    model, tokenizer = load_official(tiny_base, device="cpu"), load_tokenizer(tiny_base)
    with pytest.raises(ConfigError, match=r"of 2 prompts .* fewer than 16.*retain\.prompts=shipped"):
        sample_prompts(model, tokenizer, seed=3, num_sampled=2)


# ---- settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"retain": RetainSettings(loss="kl")}, r"`retain\.loss` is `kl` and `tune` is `full`"),
        ({"retain": RetainSettings(), "from_scratch": True}, r"`from_scratch` is true.*`retain=null`"),
    ],
)
def test_what_has_no_base_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig(tune="full", prefix=None, **values)
