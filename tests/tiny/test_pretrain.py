"""Training glm-tiny goes through the ordinary train command, plain text included."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from glmtune.data.encode import encode_training_row
from glmtune.data.reading.layouts import Layout, convert
from glmtune.data.records import Conversation, RowProblem
from glmtune.data.settings import DataSettings
from glmtune.messages import Message
from glmtune.models.checkpoints.writing import save_official
from glmtune.models.load import load_official
from glmtune.models.releases.families import Family
from glmtune.models.releases.source import resolve_source
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.training.adapt import fresh_model
from recipes.train import COMMAND, TrainConfig, run
from recipes.words.compose import load_settings


def test_plain_text_is_learnt_from_its_first_token():
    tokenizer = load_tokenizer_folder(resolve_source("glm-tiny"), Family.CHATGLM2)
    row = Conversation((Message("assistant", "问题：1+1=?\n回答：2"),), "x", 1)
    encoded = encode_training_row(tokenizer, row, DataSettings())[0]
    assert encoded.input_ids[:2] == tokenizer.prefix_ids
    assert encoded.labels[:2] == [-100, -100]
    assert encoded.labels[2:] == encoded.input_ids[2:]
    assert encoded.input_ids[-1] == tokenizer.end_id


def test_a_lone_answer_is_a_text_for_training_and_no_question_for_prediction():
    layout = Layout("openai", ("messages",), "messages")
    values = {"messages": [{"role": "assistant", "content": "你好"}]}
    assert convert(layout, values) == (Message("assistant", "你好"),)
    with pytest.raises(RowProblem, match="assistant"):
        convert(layout, values, need_answer=False)


def test_a_fresh_model_reads_and_writes_tokens_with_one_matrix(tmp_path: Path):
    model = fresh_model("glm-tiny", device="cpu", family=None)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_official(model, tmp_path)
    stored = load_official(tmp_path)
    assert stored.lm_head.weight.equal(model.lm_head.weight)
    assert stored.lm_head.weight is not stored.model.embed_tokens.weight
    assert stored.fingerprint() == model.fingerprint()


def test_a_few_steps_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = load_settings(COMMAND, ["+recipe=pretrain_tiny"])
    assert isinstance(config, TrainConfig)
    data = dataclasses.replace(
        config.data,
        train_file="generated:glm-tiny/train/32",
        validation_file="generated:glm-tiny/validation/8",
    )
    trainer = dataclasses.replace(
        config.trainer,
        max_steps=2,
        per_device_train_batch_size=8,
        eval_steps=None,
        num_threads=1,
        report_to=[],
    )
    config = dataclasses.replace(config, data=data, trainer=trainer, output_dir=str(tmp_path / "run"))
    result = run(config)
    assert result.steps == 2
    longer = dataclasses.replace(trainer, max_steps=3)
    assert run(dataclasses.replace(config, trainer=longer, resume="force")).steps == 3
    assert result.results["train_rows"] == 32
    assert (tmp_path / "run" / "last" / "config.json").exists()
