"""Predictions of a model that thinks first: thoughts stand beside the answer, which alone is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmtune.data.dataset import load_conversations
from glmtune.data.settings import DataSettings
from glmtune.inference.engine.many_prompts import GeneratedIds
from glmtune.inference.predict import generate
from glmtune.inference.predict.predictions import Prediction, read_predictions
from glmtune.inference.predict.questions import build_questions
from glmtune.inference.settings import GenerationSettings
from tests.models.templates.chat_folders import FORMS, chat_tokenizer


@pytest.mark.parametrize(
    ("form", "text", "thoughts", "answer"),
    [
        ("thinking", "\n2 and 2\n</think>\n四 legs", "2 and 2", "四 legs"),
        ("thinking", "\n2 and", "2 and", ""),
        ("edge", "<think>2</think>4", "2", "4"),
        ("roles", "\n4 </think>", "", "4 </think>"),
    ],
)
def test_thoughts_stand_beside_the_answer(
    form: str, text: str, thoughts: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat_tokenizer(tmp_path, FORMS[form])
    ids = tuple(tokenizer.text_ids(text))

    def scripted(*_: Any, **__: Any) -> list[Any]:
        return [
            GeneratedIds(
                index=0,
                token_ids=ids,
                stop_reason="eos",
                num_prompt_tokens=1,
            )
        ]

    monkeypatch.setattr(generate, "generate_ids", scripted)
    model: Any = None
    (found,) = generate.generate_completions(model, tokenizer, [[1]], GenerationSettings())
    assert (found.thoughts, found.text) == (thoughts, answer)


def test_a_row_is_written_and_read_with_its_thoughts(tmp_path: Path) -> None:
    rows = [Prediction(row=0, prediction="4", reference="4", thoughts="2 and 2"), Prediction(1, "4", "4")]
    file = tmp_path / "generated_predictions.jsonl"
    file.write_text("".join(row.to_line() for row in rows), encoding="utf-8")
    assert read_predictions(file) == rows
    assert "thoughts" not in rows[1].to_line()


def test_references_are_answers_without_thoughts(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "folder", FORMS["thinking"])
    file = tmp_path / "rows.jsonl"
    row = {"content": "How many?", "summary": "<think>2 and 2</think>\nFour legs."}
    file.write_text(json.dumps(row), encoding="utf-8")
    settings = DataSettings(test_file=str(file), max_source_length=100, max_target_length=100)
    (question,) = build_questions(
        tokenizer, load_conversations(settings, "test", need_answers=False), settings
    )
    assert question.reference == "Four legs."
    assert question.prompt.endswith("<|assistant|>\n<think>")
