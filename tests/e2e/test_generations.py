"""Every generation x method x dtype: two real training steps through the train command, and what they leave."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from glmtune import load_model, load_tokenizer
from glmtune.errors import ConfigError
from glmtune.models.load import load_official
from glmtune.models.releases.families import Family
from glmtune.prefix.checkpoint import save_prefix
from glmtune.prefix.init import build_prefix_encoder
from glmtune.prefix.settings import PrefixSettings
from recipes import predict
from recipes.train import COMMAND, run
from recipes.words.compose import load_settings
from tests.e2e.conftest import MakeBase

GENERATIONS = tuple(Family)
RECIPES = {"prefix": "ptuning", "lora": "lora", "full": "full"}
FILES = {
    "prefix": "prefix_encoder.safetensors",
    "lora": "adapter_model.safetensors",
    "full": "model.safetensors",
}


def settings(base: Path, rows: Path, method: str, folder: Path, *more: str) -> list[str]:
    overrides = [
        f"+recipe={RECIPES[method]}",
        "data=files",
        f"data.train_file={rows}",
        f"data.validation_file={rows}",
        "data.prompt_column=prompt",
        "data.response_column=response",
        f"model.source={base}",
        "model.device=cpu",
        "retention=null",
        "trainer.max_steps=2",
        "trainer.save_steps=2",
        "trainer.per_device_train_batch_size=2",
        "trainer.gradient_accumulation_steps=1",
        "trainer.learning_rate=0.01",
        "trainer.logging_steps=1",
        "trainer.gradient_checkpointing=true",
        f"output_dir={folder}",
    ]
    return [*overrides, *(["prefix.pre_seq_len=4"] if method == "prefix" else []), *more]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", list(RECIPES))
@pytest.mark.parametrize("family", GENERATIONS)
def test_two_steps(
    make_base: MakeBase, question_rows: Path, family: Family, method: str, dtype: str, tmp_path: Path
) -> None:
    base = make_base(family, dtype)
    before = load_official(base, device="cpu")
    assert before.family is family
    assert str(before.dtype) == f"torch.{dtype}"
    result = run(load_settings(COMMAND, settings(base, question_rows, method, tmp_path / "run")))
    assert result.steps == 2
    assert math.isfinite(result.results["final_eval_loss"])
    assert result.results["final_eval_loss"] != result.results["baseline_eval_loss"]
    last = tmp_path / "run" / "last"
    assert (last / FILES[method]).is_file()
    assert result.results["base_fingerprint"] == before.fingerprint()
    tokenizer = load_tokenizer(base)
    inputs = tokenizer(["Which fruit?", "还剩几个苹果？"], padding=True, return_tensors="pt")
    tuned = tuned_model(base, last, method)
    with torch.no_grad():
        logits = tuned(**inputs).logits
        assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()
        assert not torch.equal(logits.float(), before(**inputs).logits.float())
    assert load_official(base, device="cpu").fingerprint() == before.fingerprint()
    assert tuned.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3


def tuned_model(base: Path, last: Path, method: str) -> torch.nn.Module:
    if method == "prefix":
        return load_model(base, prefix=last, device="cpu")
    if method == "full":
        return load_model(last, device="cpu")
    from peft import PeftModel

    return PeftModel.from_pretrained(load_official(base, device="cpu"), str(last)).eval()


def test_packing_is_refused_for_the_first_generation(
    make_base: MakeBase, question_rows: Path, tmp_path: Path
) -> None:
    base = make_base(Family.CHATGLM, "float32")
    command = settings(base, question_rows, "prefix", tmp_path / "run", "data.packing=true")
    with pytest.raises(ConfigError, match=r"`data.packing` is true, but .* a ChatGLM-6B"):
        run(load_settings(COMMAND, command))


@pytest.mark.parametrize("family", GENERATIONS)
def test_answers_do_not_depend_on_the_batch(
    make_base: MakeBase, question_rows: Path, family: Family, tmp_path: Path
) -> None:
    model = load_official(make_base(family, "float32"), device="cpu")
    torch.manual_seed(1)
    save_prefix(build_prefix_encoder(model, PrefixSettings(pre_seq_len=3)), tmp_path / "prefix")
    answers = []
    for batch_size in (1, 4):
        overrides = [
            "data=files",
            f"data.test_file={question_rows}",
            "data.prompt_column=prompt",
            "data.response_column=response",
            f"model.source={make_base(family, 'float32')}",
            "model.device=cpu",
            f"prefix_path={tmp_path / 'prefix'}",
            "generation.max_new_tokens=6",
            "generation.do_sample=false",
            f"generation.batch_size={batch_size}",
            f"output_dir={tmp_path / str(batch_size)}",
        ]
        predict.run(load_settings(predict.COMMAND, overrides))
        file = tmp_path / str(batch_size) / "generated_predictions.jsonl"
        answers.append([json.loads(line)["prediction"] for line in file.read_text().splitlines()])
    assert len(answers[0]) == 4
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family", [Family.CHATGLM, Family.GLM4, Family.TRANSFORMERS])
def test_random_weights_become_a_checkpoint(
    make_base: MakeBase, question_rows: Path, family: Family, tmp_path: Path
) -> None:
    base = make_base(family, "float32")
    command = settings(base, question_rows, "full", tmp_path / "run", "from_scratch=true")
    result = run(load_settings(COMMAND, command))
    model = load_official(tmp_path / "run" / "last", device="cpu")
    assert model.fingerprint() not in {result.results["base_fingerprint"], load_official(base).fingerprint()}
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (family is Family.CHATGLM)
