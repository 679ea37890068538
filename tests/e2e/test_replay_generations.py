"""Replay through the train command on every way a release reads its rows: general loss as computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from glmtune import load_model, load_tokenizer
from glmtune.models.releases.families import Family
from glmtune.retention.base_answers import read_answers
from glmtune.training.log import read_log
from recipes.train import COMMAND, run
from recipes.words.compose import load_settings
from tests.e2e.conftest import MakeBase
from tests.e2e.test_generations import settings

QUESTIONS = ("你好", "How many apples are left?", "写一段广告。")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in QUESTIONS), encoding="utf-8")
    return file


def trained(base: Path, rows: Path, prompts: Path, folder: Path, method: str, *more: str) -> list[float]:
    """Train two steps, all three general rows in each, and return the general loss of either."""
    words = settings(
        base, rows, method, folder, "retain=normal", f"retain.prompts={prompts}", "retain.rows=3"
    )
    run(load_settings(COMMAND, [*words, "retain.max_new_tokens=8", *more]))
    return [entry["retain_loss"] for entry in read_log(folder) if "retain_loss" in entry]


@torch.no_grad()
def loss_by_hand(base: Path, folder: Path) -> float:
    """Mean over all tokens of the base's answers of what the base itself gives them."""
    model, tokenizer = load_model(base, device="cpu"), load_tokenizer(base)
    answers = read_answers(folder / "retention" / "retain.jsonl", tokenizer)
    losses = []
    for prompt, answer in zip(answers.prompt_ids, answers.answer_ids, strict=True):
        # One row without padding: positions, and ChatGLM-6B's mask, follow from the ids alone.
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].float()
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        losses += [
            float(-logits[place].log_softmax(-1)[token]) for place, token in zip(places, answer, strict=True)
        ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", [Family.CHATGLM, Family.CHATGLM2, Family.CHATGLM3, Family.GLM4])
def test_the_first_step_replays_what_the_base_gives_its_own_answers(
    make_base: MakeBase, question_rows: Path, prompts: Path, family: Family, tmp_path: Path
) -> None:
    base, folder = make_base(family, "float32"), tmp_path / "run"
    first, second = trained(base, question_rows, prompts, folder, "lora")  # a fresh LoRA is the base
    assert first == pytest.approx(loss_by_hand(base, folder), rel=1e-4)
    assert second != first


def test_packed_rows_replay_as_padded_ones(
    make_base: MakeBase, question_rows: Path, prompts: Path, tmp_path: Path
) -> None:
    base = make_base(Family.CHATGLM3, "float32")
    exact = "prefix.dropout=0"
    padded = trained(base, question_rows, prompts, tmp_path / "padded", "prefix", exact)
    packing = (exact, "data.packing=true", "data.max_source_length=64", "data.max_target_length=32")
    packed = trained(base, question_rows, prompts, tmp_path / "packed", "prefix", *packing)
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)  # before the first update both are one model
    assert len(packed) == 2


@pytest.mark.slow
def test_compiled_models_replay_by_kl(
    make_base: MakeBase, question_rows: Path, prompts: Path, tmp_path: Path
) -> None:
    base, words = (
        make_base(Family.CHATGLM2, "float32"),
        ("retain.loss=kl", "trainer.max_steps=4", "lora.dropout=0"),
    )
    plain = trained(base, question_rows, prompts, tmp_path / "plain", "lora", *words)
    compiled = trained(
        base, question_rows, prompts, tmp_path / "compiled", "lora", *words, "trainer.torch_compile=true"
    )
    assert compiled == pytest.approx(plain, rel=1e-2, abs=1e-6)
    assert plain[-1] > 1e-5
