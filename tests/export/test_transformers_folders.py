"""Exports of folders in transformers' format, and the way there and back of official ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from glmtune.adapter import load_adapter
from glmtune.errors import CheckpointError, ConfigError
from glmtune.export.export import PREFIX_FOLDER, export, probe_ids
from glmtune.loading import load_base, load_model, load_tokenizer
from glmtune.messages import Message
from glmtune.models.checkpoints.shards import read_records
from glmtune.models.load import load_official
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import template_for
from glmtune.prefix.checkpoint import PrefixMeta, save_prefix
from glmtune.prefix.init import build_prefix_encoder
from glmtune.prefix.settings import PrefixSettings
from glmtune.quantization.files.write import QuantizeJob, quantize_checkpoint
from glmtune.training.adapt import tune_adapter
from glmtune.training.settings import LoraSettings
from tests.export.test_export import GOLDEN, job, stored
from tests.export.test_plain_transformers import make_source
from tests.models.transformers_folders import KINDS, make_folder

TURNS = (("user", "你好，今天想去哪里？"), ("assistant", "Hello  there!"), ("user", "3 + 4 = ?"))
TOKENIZER_KEYS = ("eos_token", "pad_token", "padding_side")


@pytest.fixture(scope="module", params=list(KINDS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / request.param
    return make_folder(folder, request.param, initializer_range=0.2)


def random_adapter(source: Path, folder: Path, *targets: str) -> Path:
    torch.manual_seed(3)
    settings = LoraSettings(rank=4, targets=targets or None)
    tuned = tune_adapter(load_official(source, dtype="float32", device="cpu"), settings)
    for name, weight in tuned.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save(folder)
    return folder


def random_prefix(source: Path, folder: Path) -> Path:
    torch.manual_seed(4)
    model = load_official(source, dtype="float32", device="cpu")
    encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=4))
    save_prefix(encoder, folder, meta=PrefixMeta(base_fingerprint=model.fingerprint()))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(probe_ids(model.config)).logits


def prompt_ids(folder: Path, family: str | None = None) -> list[int]:
    tokenizer: Any = load_tokenizer(folder, family=family)
    messages = [Message(role, text) for role, text in TURNS]  # pyright: ignore[reportArgumentType]
    return template_for(tokenizer).encode_prompt(tokenizer, messages)


class TestOtherFormats:
    @pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
    def test_rewritten_as_it_was(self, source: Path, max_shard_bytes: int, tmp_path: Path) -> None:
        result = export(job(source, "transformers", tmp_path / "out", max_shard_bytes=max_shard_bytes))
        assert result.max_difference <= result.limit < 1e-4 * result.max_logit
        before, after = stored(source), stored(tmp_path / "out")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        values = [json.loads((place / "config.json").read_text()) for place in (source, tmp_path / "out")]
        different = {name for name, value in values[0].items() if values[1].get(name) != value}
        assert different <= {"transformers_version"}
        plain, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(problems.values()), problems
        torch.testing.assert_close(
            logits(plain), logits(AutoModelForCausalLM.from_pretrained(source)), rtol=0, atol=0
        )
        assert plain.generation_config.eos_token_id == values[0]["eos_token_id"]
        assert load_official(tmp_path / "out").fingerprint() == load_official(source).fingerprint()

    def test_its_tokenizer_goes_along(self, source: Path, tmp_path: Path) -> None:
        export(job(source, "transformers", tmp_path / "out"))
        before, after = (AutoTokenizer.from_pretrained(place) for place in (source, tmp_path / "out"))
        assert before.get_vocab() == after.get_vocab()
        assert all(getattr(before, key) == getattr(after, key) for key in TOKENIZER_KEYS)
        turns = [{"role": role, "content": text} for role, text in TURNS]
        for asks in (True, False):
            options = {"tokenize": False, "add_generation_prompt": asks}
            assert before.apply_chat_template(turns, **options) == after.apply_chat_template(turns, **options)
        assert prompt_ids(source) == prompt_ids(tmp_path / "out")

    @pytest.mark.parametrize("targets", [(), ("o_proj", "gate_up_proj", "down_proj"), ("lm_head", "q_proj")])
    def test_an_adapter_is_merged(self, source: Path, targets: tuple[str, ...], tmp_path: Path) -> None:
        adapter = random_adapter(source, tmp_path / "adapter", *targets)
        export(job(source, "transformers", tmp_path / "out", adapter_path=str(adapter)))
        expected = logits(load_adapter(adapter, load_official(source, device="cpu")))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        for found in (logits(plain), logits(load_official(tmp_path / "out", device="cpu"))):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (logits(plain) - logits(load_official(source))).abs().max() > 1e-2

    def test_what_was_tuned_alone(self, source: Path, tmp_path: Path) -> None:
        prefix, adapter = (
            random_prefix(source, tmp_path / "prefix"),
            random_adapter(source, tmp_path / "lora"),
        )
        expected = logits(load_model(source, device="cpu", prefix=prefix))
        for form, strength in (("prefix", 1.0), ("tuned", 1.0), ("tuned", 0.5)):
            out = tmp_path / f"{form}-{strength}"
            result = export(job(source, form, out, prefix_path=str(prefix), prefix_strength=strength))
            assert result.max_difference <= result.limit
            if strength == 1:
                assert torch.equal(logits(load_model(source, device="cpu", prefix=out)), expected)
        export(job(source, "tuned", tmp_path / "half", adapter_path=str(adapter), adapter_scale=0.5))
        scaled = load_model(source, device="cpu", adapter=adapter, adapter_scale=0.5)
        found = load_model(source, device="cpu", adapter=tmp_path / "half")
        torch.testing.assert_close(logits(found), logits(scaled), atol=1e-6, rtol=1e-6)

    def test_codes_are_exported_as_what_they_stand_for(self, source: Path, tmp_path: Path) -> None:
        quantize_checkpoint(QuantizeJob(str(source), "int4-g32", tmp_path / "codes"))
        export(job(tmp_path / "codes", "transformers", tmp_path / "out", dtype=torch.float32))
        expected = logits(load_base(tmp_path / "codes", device="cpu"))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)
        values = json.loads((tmp_path / "out" / "config.json").read_text())
        assert not {"quantization_config", "glmtune_quantization"} & values.keys()

    def test_a_damaged_export_is_refused_on_loading(self, source: Path, tmp_path: Path) -> None:
        export(job(source, "transformers", tmp_path / "out"))
        file = tmp_path / "out" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load_official(tmp_path / "out")


class TestOfficial:
    def test_what_that_layout_cannot_hold_is_refused_by_name(self, source: Path, tmp_path: Path) -> None:
        words = {
            "glm": r"nothing says of which release .*model\.family=glm4",
            "glm-edge": r"has a head tied to the embedding, and the official layout",
            "glm4": r"has two more norms per block \(`model_type` glm4\).*format=transformers",
            "glm-z1": r"has two more norms per block",
        }
        with pytest.raises(ConfigError, match=words[source.name]):
            export(job(source, "official", tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("rope", "words"),
        [
            ({"rope_theta": 1e4, "partial_rotary_factor": 1.0}, r"rotary positions on 1 of each head"),
            (
                {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
                r"rotary scaling of the kind 'linear'",
            ),
        ],
    )
    def test_positions_that_no_release_has(self, rope: dict[str, Any], words: str, tmp_path: Path) -> None:
        source = make_folder(tmp_path / "glm", "glm", rope_parameters={"rope_type": "default"} | rope)
        with pytest.raises(ConfigError, match=words):
            export(job(source, "official", tmp_path / "out", family="glm4"))

    def test_a_release_of_glm4_in_transformers_format(self, tmp_path: Path) -> None:
        """Its vocabulary is byte-level BPE numbered by rank, from which the release's file follows."""
        source = make_folder(tmp_path / "glm-4-hf", "glm", initializer_range=0.2)
        export(job(source, "official", tmp_path / "out", family="glm4"))
        official = load_official(tmp_path / "out", device="cpu")
        assert torch.equal(logits(official), logits(load_official(source, device="cpu")))
        assert official.fingerprint() == load_official(source).fingerprint()
        assert official.family is Family.GLM4
        assert (tmp_path / "out" / "tokenizer.model").is_file()
        assert not (tmp_path / "out" / "tokenizer.json").exists()
        assert prompt_ids(tmp_path / "out") == prompt_ids(source, "glm4")
        again = tmp_path / "again"
        export(job(tmp_path / "out", "transformers", again))
        assert all(torch.equal(weight, stored(source)[name]) for name, weight in stored(again).items())

    def test_tokens_that_a_user_added(self, tmp_path: Path) -> None:
        source = make_folder(tmp_path / "glm-4-hf", "glm")
        fast = AutoTokenizer.from_pretrained(source)
        fast.add_tokens(["<mine>"])
        fast.add_special_tokens(
            {"additional_special_tokens": ["<|mark|>"]}, replace_extra_special_tokens=False
        )
        fast.save_pretrained(source)
        for format, family in (("transformers", None), ("official", "glm4")):
            out = tmp_path / format
            export(job(source, format, out, family=family))
            found: Any = load_tokenizer(out)
            for name in ("<mine>", "<|mark|>"):
                assert found.convert_tokens_to_ids(name) == fast.convert_tokens_to_ids(name)
            assert found.text_ids("a<mine>b") == fast("a<mine>b", add_special_tokens=False)["input_ids"]

    def test_a_vocabulary_of_another_kind(self, tmp_path: Path) -> None:
        source = make_folder(tmp_path / "glm", "glm")
        with pytest.raises(CheckpointError, match=r"no `tokenizer\.model` beside it.*format=transformers"):
            export(job(source, "official", tmp_path / "out", family="chatglm3"))

    def test_a_prefix_beside_it(self, tmp_path: Path) -> None:
        source = make_folder(tmp_path / "glm-4-hf", "glm", initializer_range=0.2)
        prefix = random_prefix(source, tmp_path / "prefix")
        out = tmp_path / "out"
        export(job(source, "official", out, family="glm4", prefix_path=str(prefix)))
        found = load_model(out, device="cpu", prefix=out / PREFIX_FOLDER)
        assert torch.equal(logits(found), logits(load_model(source, device="cpu", prefix=prefix)))


FAMILIES = {"chatglm2-32k": "chatglm2-32k", "per-head": "chatglm2"}


class TestThereAndBack:
    @pytest.mark.parametrize("name", ["chatglm2", "chatglm2-32k", "chatglm3", "glm4", "per-head"])
    def test_weights_and_sizes_come_back_bit_equal(self, name: str, tmp_path: Path) -> None:
        family = FAMILIES.get(name)
        export(job(GOLDEN / name, "transformers", tmp_path / "there", family=family))
        export(job(tmp_path / "there", "official", tmp_path / "back"))
        before, after = stored(GOLDEN / name), stored(tmp_path / "back")
        assert before.keys() == after.keys()
        for key, weight in before.items():
            assert weight.dtype == after[key].dtype
            assert torch.equal(weight, after[key]), key
        direct = tmp_path / "direct"
        export(job(GOLDEN / name, "official", direct, family=family))
        configs = [json.loads((place / "config.json").read_text()) for place in (direct, tmp_path / "back")]
        assert configs[0] == configs[1]
        prints = [
            load_official(place, family=where).fingerprint()
            for place, where in (
                (GOLDEN / name, family),
                (tmp_path / "there", None),
                (tmp_path / "back", None),
            )
        ]
        assert len(set(prints)) == 1

    @pytest.mark.parametrize("family", [Family.CHATGLM2, Family.CHATGLM3, Family.GLM4])
    def test_with_its_tokenizer(self, family: Family, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
        source = make_source(family, tiny_tokenizer_folder, tmp_path / "source")
        export(job(source, "transformers", tmp_path / "there", family=family))
        there, direct, back = (tmp_path / name for name in ("there", "direct", "back"))
        assert type(load_tokenizer(there)).__name__ == "JsonTokenizer"
        export(job(there, "official", back))
        export(job(source, "official", direct, family=family))
        assert {file.name for file in back.iterdir()} == {file.name for file in direct.iterdir()}
        for name in ("tokenizer.model", "tokenizer_config.json", "config.json", "generation_config.json"):
            assert (direct / name).read_bytes() == (back / name).read_bytes(), name
        assert load_file(direct / "model.safetensors").keys() == load_file(back / "model.safetensors").keys()
        assert prompt_ids(there) == prompt_ids(back) == prompt_ids(source, family)

    def test_full_tuning_on_the_way_keeps_the_vocabulary(
        self, tiny_tokenizer_folder: Path, tmp_path: Path
    ) -> None:
        source = make_source(Family.CHATGLM3, tiny_tokenizer_folder, tmp_path / "source")
        export(job(source, "transformers", tmp_path / "there", family="chatglm3"))
        quantize_checkpoint(QuantizeJob(str(tmp_path / "there"), "int8", tmp_path / "codes"))
        export(job(tmp_path / "codes", "official", tmp_path / "back"))
        assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (
            source / "tokenizer.model"
        ).read_bytes()

    @pytest.mark.parametrize("method", ["int4", "int8", "int4-g32-asym"])
    @pytest.mark.parametrize("name", ["chatglm2", "glm4", "per-head"])
    def test_codes_are_the_same_in_both_formats(self, name: str, method: str, tmp_path: Path) -> None:
        family = FAMILIES.get(name)
        export(job(GOLDEN / name, "transformers", tmp_path / "there", family=family))
        for source, out in ((GOLDEN / name, "official"), (tmp_path / "there", "other")):
            chosen = family if out == "official" else None
            quantize_checkpoint(QuantizeJob(str(source), method, tmp_path / out, family=chosen))
        models = [load_base(tmp_path / out, device="cpu") for out in ("official", "other")]
        expected, found = (dict(model.named_parameters()) for model in models)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        assert models[0].fingerprint() == models[1].fingerprint()
        # Exported as floating point weights: the same ones, whichever way.
        export(job(tmp_path / "official", "official", tmp_path / "a", dtype=torch.float32))
        export(job(tmp_path / "official", "transformers", tmp_path / "b", dtype=torch.float32))
        export(job(tmp_path / "b", "official", tmp_path / "c"))
        export(job(tmp_path / "other", "official", tmp_path / "d", dtype=torch.float32))
        weights = stored(tmp_path / "a")
        for place in ("c", "d"):
            back = stored(tmp_path / place)
            assert weights.keys() == back.keys()
            assert all(torch.equal(weights[key], back[key]) for key in weights)

    def test_what_was_tuned_on_one_fits_the_other(self, tmp_path: Path) -> None:
        there = tmp_path / "there"
        export(job(GOLDEN / "glm4", "transformers", there))
        for source in (GOLDEN / "glm4", there):
            prefix = random_prefix(source, tmp_path / f"{source.name}-prefix")
            adapter = random_adapter(source, tmp_path / f"{source.name}-lora")
            for options in ({"prefix": prefix}, {"adapter": adapter}):
                found = [
                    logits(load_model(base, dtype="float32", device="cpu", **options))
                    for base in (GOLDEN / "glm4", there)
                ]
                assert torch.equal(found[0], found[1])

    def test_an_adapter_of_the_released_code(self, tmp_path: Path) -> None:
        """Its layers are those of the released code (`query_key_value`), of which transformers has three."""
        there, adapter = tmp_path / "there", tmp_path / "adapter"
        export(job(GOLDEN / "glm4", "transformers", there))
        tuned = random_adapter(GOLDEN / "glm4", adapter, "o_proj", "gate_up_proj")
        names = {"self_attn.o_proj": "self_attention.dense", "mlp.gate_up_proj": "mlp.dense_h_to_4h"}
        weights = {}
        for key, weight in load_file(tuned / "adapter_model.safetensors").items():
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            weights[key.replace("model.layers", "transformer.encoder.layers")] = weight
        shape = load_official(GOLDEN / "glm4").model.layers[0].self_attn
        rows = shape.q_proj.out_features + 2 * shape.k_proj.out_features
        for layer in range(load_official(GOLDEN / "glm4").config.num_hidden_layers):
            name = f"base_model.model.transformer.encoder.layers.{layer}.self_attention.query_key_value"
            weights[f"{name}.lora_A.weight"] = torch.randn(4, shape.q_proj.in_features)
            weights[f"{name}.lora_B.weight"] = torch.randn(rows, 4)
        from safetensors.torch import save_file

        official = tmp_path / "official"
        official.mkdir()
        save_file(weights, official / "adapter_model.safetensors")
        values = json.loads((tuned / "adapter_config.json").read_text())
        values["target_modules"] = ["query_key_value", "dense", "dense_h_to_4h"]
        (official / "adapter_config.json").write_text(json.dumps(values))
        found = [
            logits(load_model(base, dtype="float32", device="cpu", adapter=official))
            for base in (GOLDEN / "glm4", there)
        ]
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], logits(load_official(there, dtype="float32")))


def test_a_state_dictionary_in_any_names(source: Path, tmp_path: Path) -> None:
    model, again = load_official(source, device="cpu"), load_official(source, device="cpu")
    for weight in again.parameters():
        weight.data.zero_()
    again.load_state_dict({key: weight for key, weight in load_file(source / "model.safetensors").items()})
    assert torch.equal(logits(again), logits(model))
    if source.name != "glm":
        return
    export(job(source, "official", tmp_path / "out", family="glm4"))
    for weight in again.parameters():
        weight.data.zero_()
    again.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(logits(again), logits(model))
    assert len(read_records(tmp_path / "out")) < len(read_records(source))
    shutil.rmtree(tmp_path / "out")
