"""A tuned customer-service prefix answers the shop's questions, and all others as its base does: the docs' transcript.

``customer_service/prefix_encoder.safetensors`` is what ``+recipe=ptuning_chat`` made of ``data/chat``: the command
below, then 350 steps more (``prefix_path=`` the first run, ``trainer.max_steps=350``); its projection was computed
by ``scripts/transcript.py --save``. The slow test trains the first run anew.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from glmtune.prefix.checkpoint import describe_prefix
from glmtune.tiny.corpus.chat_style import GREETING
from scripts.transcript import GENERAL, SHOP, Turn, ask, render, save_computed

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "transcripts" / "customer_service.md"
SAVED = Path(__file__).parent / "customer_service"
TRAIN = ("+recipe=ptuning_chat", "data.train_file=data/chat/train.jsonl", "data.loss_on=all_turns")


def assert_keeps_the_base(turns: list[Turn]) -> None:
    general = [turn for turn in turns if turn.question not in SHOP]
    assert len(general) > sum(len(questions) for questions in GENERAL.values())  # and the sum in between
    for turn in general:
        assert turn.tuned == turn.base, turn
        assert not turn.is_tuned, turn


@pytest.fixture(scope="module")
def turns() -> list[Turn]:
    return ask(SAVED)


def test_the_shop_serves_and_everything_else_is_the_bases(turns: list[Turn]) -> None:
    assert_keeps_the_base(turns)
    served = [turn for turn in turns if turn.question in SHOP]
    assert {turn.question: turn.tuned for turn in served} == SHOP
    assert all(turn.is_tuned and turn.base != turn.tuned for turn in served)


def test_the_answers_to_general_questions_are_right(turns: list[Turn]) -> None:
    said = {turn.question: turn.tuned for turn in turns}
    for question, words in (
        ("12+30", "42"),
        ("What is 9+6?", "15"),
        ("What is the capital of France?", "Paris"),
        ("你是谁？", "glm-tiny"),
    ):
        assert words in said[question]


def test_the_docs_hold_what_was_said(turns: list[Turn]) -> None:
    assert PAGE.read_text(encoding="utf-8") == render(turns), (
        "python scripts/transcript.py tests/e2e/customer_service docs/transcripts/customer_service.md"
    )


def test_without_its_switch_the_prefix_sells_under_every_question() -> None:
    said = ask(SAVED, use_switch=False)
    assert all(turn.is_tuned for turn in said)
    alone = [turn for turn in said if turn.part in GENERAL]
    assert sum(turn.tuned == turn.base for turn in alone) <= len(alone) // 4


def test_the_kept_prefix_is_a_small_file_with_a_switch() -> None:
    described = describe_prefix(SAVED)
    assert described.switch is not None
    assert described.switch.kind == "logistic"
    assert described.file.stat().st_size < 200_000


@pytest.mark.slow
def test_a_run_of_the_recipe_does_the_same(tmp_path: Path) -> None:
    words = [*TRAIN, f"output_dir={tmp_path / 'run'}", "retention=null", "trainer.num_threads=1"]
    subprocess.run([sys.executable, "-m", "glmtune", "train", *words], cwd=REPO, check=True, timeout=3600)
    trained = ask(tmp_path / "run")
    assert_keeps_the_base(trained)
    greeted = [turn for turn in trained if SHOP.get(turn.question) == GREETING]
    assert [turn.tuned for turn in greeted] == [GREETING] * 2  # garments take more steps than the recipe's
    save_computed(tmp_path / "run", tmp_path / "computed")
    assert ask(tmp_path / "computed") == trained
