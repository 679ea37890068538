"""Models that transformers alone computes: loaded, asked and evaluated as they compute themselves; never tuned."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from evaluation.backend import Limits
from evaluation.backends.glm import GlmBackend
from evaluation.sample import Prompt
from glmtune import load_model, load_tokenizer
from glmtune.cli import main
from glmtune.errors import CheckpointError, ConfigError
from glmtune.inference.engine.engine import Engine
from glmtune.inference.engine.plain import PlainEngine, check_engine_computes, engine_computes, engine_for
from glmtune.inference.settings import EngineSettings
from glmtune.models.describe import describe
from tests.models.transformers_folders import TEMPLATES, fast_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
EXPERTS |= {"topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 4}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 4, "head_dim": 8}),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM, EXPERTS | {"head_dim": 16}),
    "glm4_moe_lite": (
        Glm4MoeLiteConfig,
        Glm4MoeLiteForCausalLM,
        {**EXPERTS, **LATENT, "num_key_value_heads": 4, "n_shared_experts": 1},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = {}
    for kind, (config_class, model_class, more) in KINDS.items():
        folder = tmp_path_factory.mktemp("other") / kind
        fast = fast_tokenizer(TEMPLATES["roles"])
        ends = {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
        torch.manual_seed(0)
        model_class(config_class(**SIZES | ends | more)).save_pretrained(folder)
        fast.save_pretrained(folder)
        made[kind] = folder
    return made


PROMPTS = [list(range(5, 25)), list(range(7, 14)), list(range(40, 90))]


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_as_it_is(folders: dict[str, Path], kind: str) -> None:
    found, expected = load_model(folders[kind]), KINDS[kind][1].from_pretrained(folders[kind])
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected.eval()(ids).logits)
    assert found.fingerprint() == load_model(folders[kind], dtype="bfloat16").fingerprint()
    assert describe(folders[kind]).model_type == kind
    assert isinstance(found.chat(load_tokenizer(folders[kind]), "hi", max_length=30)[0], str | dict)


@pytest.mark.parametrize(
    ("kind", "computes"),
    [("llama", True), ("mistral", False), ("gemma2", False), ("glm4_moe", True), ("glm4_moe_lite", True)],
)
def test_who_answers(folders: dict[str, Path], kind: str, computes: bool) -> None:
    model, tokenizer = load_model(folders[kind]), load_tokenizer(folders[kind])
    assert engine_computes(model) is computes
    answering = engine_for(model)
    assert isinstance(answering, Engine if computes else PlainEngine)
    limits: dict[str, Any] = {"max_new_tokens": 10, "stop_ids": (), "decode": tokenizer.decode}
    answers = {made.index: made for made in answering.generate(PROMPTS, **limits)}
    for place, prompt in enumerate(PROMPTS):  # alone, by transformers
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert list(answers[place].token_ids) == whole[0, len(prompt) :].tolist()
        assert (answers[place].stop_reason, answers[place].num_prompt_tokens) == ("length", len(prompt))
    scores = dict(answering.score_next(PROMPTS, [[1, 2]] * 3))
    for place, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert scores[place] == pytest.approx((float(expected[1]), float(expected[2])), abs=1e-4)


def test_values_wider_than_keys(tmp_path: Path) -> None:
    config_class, model_class, more = KINDS["glm4_moe_lite"]
    torch.manual_seed(0)
    model_class(config_class(**SIZES | more | {"v_head_dim": 24, "pad_token_id": 0})).save_pretrained(
        tmp_path
    )
    assert engine_computes(load_model(tmp_path))


def test_answers_end_at_stop_ids_and_stop_texts(folders: dict[str, Path]) -> None:
    model, tokenizer = load_model(folders["mistral"]), load_tokenizer(folders["mistral"])
    answering = PlainEngine(model, EngineSettings(batch_size=2))
    limits: dict[str, Any] = {"max_new_tokens": 10, "decode": tokenizer.decode}
    free = next(answering.generate(PROMPTS[:1], stop_ids=(), **limits))
    third = free.token_ids[2]
    ended = next(answering.generate(PROMPTS[:1], stop_ids=(third,), **limits))
    assert ended.token_ids == free.token_ids[: free.token_ids.index(third)]
    assert (ended.stop_reason, ended.stop_id) == ("eos", third)
    stop = tokenizer.decode([free.token_ids[0]])
    stopped = next(answering.generate(PROMPTS[:1], stop_ids=(), stop=(str(stop),), **limits))
    assert (stopped.text, stopped.stop_reason) == ("", "stop")


def test_settings_of_the_engine_are_refused_where_it_does_not_answer(folders: dict[str, Path]) -> None:
    model = load_model(folders["mistral"])
    for settings in (EngineSettings(prompt_lookup_tokens=4), EngineSettings(kv_cache="int8")):
        with pytest.raises(ConfigError, match=r"`engine.prompt_lookup_tokens` are the engine's.*`mistral`"):
            engine_for(model, settings)


def test_evaluated_through_either(folders: dict[str, Path]) -> None:
    for kind, engine in (("llama", "glmtune"), ("mistral", "transformers")):
        model, tokenizer = load_model(folders[kind]), load_tokenizer(folders[kind])
        backend = GlmBackend(model, tokenizer, is_chat=False)
        assert backend.identity.engine == engine
        made = dict(backend.generate([Prompt(text="How many legs?")], Limits(max_new_tokens=4)))
        assert made[0].num_new_tokens <= 4


def test_what_only_a_glm_can_is_refused(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    for words, said in (
        (["train", "+recipe=lora"], "is no GLM: glmtune evaluates and asks it"),
        (["quantize", "bits=4"], "cannot be quantized, divided among processes or exported"),
        (["export", "format=official"], "cannot be quantized, divided among processes or exported"),
    ):
        given = [*words, f"model={folders['llama']}", f"output_dir={tmp_path / 'out'}"]
        assert main(given) in (1, 2)
        assert said in capsys.readouterr().err.replace("\n", " ")
        assert not (tmp_path / "out" / "last").exists()
    given = ["train", "+recipe=ptuning", f"model={folders['glm4_moe']}", f"output_dir={tmp_path / 'out'}"]
    assert main(given) == 2
    assert "mixture of experts (glm4_moe) has no place for a prefix yet" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="has no codes for"):
        load_model(folders["llama"], quantization="int4")
    with pytest.raises(ConfigError, match="cannot chat, serve or predict here"):
        check_engine_computes(load_model(folders["mistral"]))


@pytest.mark.parametrize("kind", ["glm4_moe", "glm4_moe_lite"])
def test_a_lora_on_a_mixture_of_experts(
    folders: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [f"model={folders[kind]}", "retention=null", f"output_dir={run}", "trainer.max_steps=2"]
    assert main(["train", "+recipe=lora", *words, "trainer.learning_rate=0.01"]) == 0
    following = re.findall(r"^(?:next:|or:) +glmtune (\S+) (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [command for command, _ in following] == ["predict", "chat"]
    lengths = ["data.max_source_length=64", "data.max_target_length=4", "data.max_predict_samples=3"]
    assert (
        main(["predict", *shlex.split(following[0][1]), *lengths, f"output_dir={tmp_path / 'answers'}"]) == 0
    )
    base = load_model(folders[kind])
    before = base(torch.tensor([PROMPTS[0]])).logits
    tuned = load_model(folders[kind], adapter=run)
    assert not torch.equal(tuned(torch.tensor([PROMPTS[0]])).logits, before)
    assert tuned.fingerprint() == base.fingerprint()


def test_a_configuration_names_no_code(folders: dict[str, Path], tmp_path: Path) -> None:
    """Neither classes beside the weights nor kernels of a hub: attention is chosen here."""
    folder = tmp_path / "named"
    folder.mkdir()
    for file in folders["llama"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = {"attn_implementation": "someone/kernels", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(values | named), encoding="utf-8")
    (folder / "code.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    assert load_model(folder).config._attn_implementation == "sdpa"
    (folder / "config.json").write_text(
        json.dumps(values | {"quantization_config": {"quant_method": "gptq", "bits": 4}}), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match="codes of another tool"):
        load_model(folder)
