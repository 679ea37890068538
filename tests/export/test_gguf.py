"""GGUF files of every kind of checkpoint, read back by the `gguf` package: keys, tokens and weights."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from glmtune.adapter import load_adapter
from glmtune.errors import CheckpointError, ConfigError
from glmtune.export import export as export_run
from glmtune.export.export import MARKER, export
from glmtune.export.gguf import folder as gguf_folder
from glmtune.export.gguf.encoding import encode
from glmtune.export.gguf.hyperparameters import Hyperparameters
from glmtune.export.gguf.layout import native_names
from glmtune.export.gguf.reading import GgufFile, read_gguf
from glmtune.export.gguf.types import FILE_TYPES
from glmtune.export.gguf.vocabulary import BYTE, CONTROL, UNUSED, USER_DEFINED, vocabulary_of
from glmtune.export.source import ExportJob
from glmtune.loading import load_tokenizer
from glmtune.models.checkpoints.transformers_format import transformers_config
from glmtune.models.load import load_official
from glmtune.models.releases.families import Family
from glmtune.models.releases.source import resolve_source
from glmtune.models.settings import CheckpointSettings
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.quantization.files.write import QuantizeJob, quantize_checkpoint
from glmtune.training.adapt import tune_adapter
from glmtune.training.settings import LoraSettings
from recipes.export import ExportConfig
from tests.conftest import TINY_SENTENCES
from tests.e2e.conftest import MakeBase
from tests.models.transformers_folders import make_folder

pytest.importorskip("gguf", reason="the `gguf` package is not installed: pip install 'glmtune[gguf]'")

HUNDREDTH = {"F32": 1e-7, "F16": 5e-4, "BF16": 4e-3, "Q8_0": 0.01, "Q4_K_M": 0.12, "Q4_0": 0.12}
"""What a tensor may be off, relative to its size."""


def job(source: Path | str, folder: Path, kind: str = "F16", **changes: object) -> ExportJob:
    values: dict[str, Any] = {"family": None, "prefix_path": None, "adapter_path": None, "dtype": None}
    values |= {"max_shard_bytes": 2**30, "overwrite": False} | changes
    return ExportJob(source=str(source), format="gguf", output_dir=folder, gguf_type=kind, **values)


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def _embedded() -> Path:
    return resolve_source("glm-tiny")


def native(found: GgufFile, model: Any) -> dict[str, torch.Tensor]:
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    return dict(native_names(found.tensors, model.config, shapes))


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_weights_are_those_of_the_source(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", "glm", hidden_size=256, head_dim=64, intermediate_size=512)
    result = export(job(folder, tmp_path / "out", kind))
    assert result.dtype == kind
    assert result.max_difference <= result.limit
    model = load_official(folder)
    found = read_gguf(only_file(tmp_path / "out"))
    weights = native(found, model)
    expected = dict(model.named_parameters(remove_duplicate=False))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert (weights[name] - weight).norm() <= HUNDREDTH[kind] * weight.norm(), name
    assert result.num_bytes < only_file(tmp_path / "out").stat().st_size
    if kind == "Q4_K_M":  # two layers: the first eighth is none, the last is the second
        assert found.kinds["blk.0.ffn_down.weight"] == "Q4_K"
        assert found.kinds["blk.1.ffn_down.weight"] == "Q6_K"
        assert found.kinds["output.weight"] == "Q6_K"


@pytest.mark.parametrize("kind", ["glm", "glm-edge", "glm4", "glm-z1"])
def test_folders_in_transformers_format(kind: str, tmp_path: Path) -> None:
    sizes = {} if kind in ("glm4", "glm-z1") else {"head_dim": 8}
    folder = make_folder(tmp_path / "in", kind, **sizes)
    export(job(folder, tmp_path / "out", "F32"))
    found = read_gguf(only_file(tmp_path / "out"))
    expected = dict(load_official(folder).named_parameters(remove_duplicate=False))
    for name, weight in native(found, load_official(folder)).items():
        assert torch.equal(weight, expected[name]), name
    arch = "glm4" if kind in ("glm4", "glm-z1") else "chatglm"
    values = found.values
    assert values["general.architecture"] == arch
    assert values[f"{arch}.rope.freq_base"] == 5e6
    assert values[f"{arch}.rope.dimension_count"] == (8 if arch == "glm4" else 4)
    assert values[f"{arch}.context_length"] == 512
    assert ("output.weight" in found.kinds) == (kind != "glm-edge")  # a tied head is not stored
    assert ("blk.1.post_ffw_norm.weight" in found.kinds) == (arch == "glm4")
    assert ("blk.0.attn_qkv.weight" in found.kinds) == (arch == "chatglm")
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.pre"] == "chatglm-bpe"  # this file merges also what is a piece as a whole
    tokenizer = load_tokenizer(folder)
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    ends = [tokenizer.get_command(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    assert [values[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")] == ends
    assert values["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(
    ("family", "base", "scaling"),
    [
        (Family.CHATGLM2, 1e4, None),
        (Family.CHATGLM2_32K, 1e4, 16.0),
        (Family.CHATGLM3, 1e4, None),
        (Family.CHATGLM3_32K, 5e5, None),
        (Family.GLM4, 5e6, None),
    ],
)
def test_official_checkpoints(
    family: Family,
    base: float,
    scaling: float | None,
    make_base: MakeBase,
    tmp_path: Path,
) -> None:
    source = make_base(family, "float32")
    export(job(source, tmp_path / "out", "F32"))
    found = read_gguf(only_file(tmp_path / "out"))
    expected = dict(load_official(source).named_parameters())
    for name, weight in native(found, load_official(source)).items():
        assert torch.equal(weight, expected[name]), name
    values = found.values
    assert values["general.architecture"] == "chatglm"
    assert values["chatglm.rope.freq_base"] == base
    assert values.get("chatglm.rope.scaling.factor") == scaling
    assert values.get("chatglm.rope.scaling.type") == ("linear" if scaling else None)
    assert values["chatglm.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert values["chatglm.attention.head_count_kv"] == 2
    is_glm4 = family is Family.GLM4
    assert values["tokenizer.ggml.model"] == ("gpt2" if is_glm4 else "llama")
    if is_glm4:
        assert values["tokenizer.ggml.pre"] == "glm4"  # tiktoken takes a word that is a piece as a whole
    else:
        assert values["tokenizer.ggml.add_space_prefix"] is True


def test_tokens_of_a_sentencepiece_file(tmp_path: Path) -> None:
    export(job("glm-tiny", tmp_path / "out"))
    values = read_gguf(only_file(tmp_path / "out")).values
    tokenizer: Any = load_tokenizer("glm-tiny")
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    scores = values["tokenizer.ggml.scores"]
    file, pieces = tokenizer.sp_model, tokenizer.sp_model.get_piece_size()
    assert tokens[:pieces] == [file.IdToPiece(index) for index in range(pieces)]
    assert scores[:pieces] == [file.GetScore(index) for index in range(pieces)]
    assert [kinds[index] == BYTE for index in range(pieces)] == [
        file.IsByte(index) for index in range(pieces)
    ]
    for name, shown in {"[gMASK]": "[gMASK]", "sop": "<sop>", "eop": "<eop>"}.items():
        assert tokens[tokenizer.get_command(name)] == shown
        assert kinds[tokenizer.get_command(name)] == CONTROL
    assert tokens[-1] == "[PAD4863]"
    assert kinds[-1] == UNUSED
    assert len(tokens) == len(set(tokens)) == 4864
    assert [values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")] == [
        1, 2, 0, 0,
    ]  # fmt: skip


def test_tokens_that_a_user_added(tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(_embedded(), source)
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["<order>"])
    tokenizer.add_tokens(["<secret>"], special_tokens=True)
    tokenizer.save_pretrained(str(source))
    found = vocabulary_of(load_tokenizer_folder(source, Family.CHATGLM2), 4864)
    assert found.kinds[found.tokens.index("<order>")] == USER_DEFINED
    assert found.kinds[found.tokens.index("<secret>")] == CONTROL
    assert found.tokens.index("<order>") == load_tokenizer(source).convert_tokens_to_ids("<order>")
    with pytest.raises(CheckpointError, match=r"the id \d+ \('<secret>'\), but the model has 3000 rows"):
        vocabulary_of(load_tokenizer_folder(source, Family.CHATGLM2), 3000)
    tokenizer.add_tokens(["[PAD4863]"])
    with pytest.raises(CheckpointError, match=r"are both called '\[PAD4863\]'"):
        vocabulary_of(tokenizer, 4864)


def test_an_export_for_transformers_keeps_its_tokens(tmp_path: Path) -> None:
    """Its tokenizer.json has merges in the place of scores: pieces must be as good in the same order."""
    job_ = job("glm-tiny", tmp_path / "native")
    export(ExportJob(**{**{name: getattr(job_, name) for name in job_.__slots__}, "format": "transformers"}))
    found = vocabulary_of(load_tokenizer_folder(tmp_path / "native", Family.CHATGLM2), 4864)
    direct = vocabulary_of(load_tokenizer_folder(_embedded(), Family.CHATGLM2), 4864)
    assert found.model == "llama"
    assert found.tokens == direct.tokens
    never_written = {"<s>", "[MASK]", "[sMASK]", "<eop>"}  # which need not be looked for in texts
    for name, kind, other in zip(found.tokens, found.kinds, direct.kinds, strict=True):
        assert kind == other or name in never_written, name
    assert found.chat_template == direct.chat_template
    made = [index for index, score in enumerate(found.scores) if score != 0]
    assert sorted(made, key=lambda index: -found.scores[index]) == sorted(
        made, key=lambda index: -direct.scores[index]
    )


def test_a_released_tokenizer(released_tokenizers: Path, tmp_path: Path) -> None:
    shutil.copy(released_tokenizers / "chatglm2-6b" / "tokenizer.model", tmp_path)
    found = vocabulary_of(load_tokenizer_folder(tmp_path, Family.CHATGLM3), 65024)
    assert len(found.tokens) == 65024
    assert [found.tokens.index(name) for name in ("[gMASK]", "<sop>", "<|user|>", "<|observation|>")] == [
        64790, 64792, 64795, 64797,
    ]  # fmt: skip
    assert found.special_ids == {
        "eos": 2, "eot": 64795, "eom": 64797, "padding": 0, "bos": 1, "unknown": 0,
    }  # fmt: skip
    assert found.ends() == ("</s>", "<|user|>", "<|observation|>")


@pytest.mark.parametrize("rule", ["nfkc", "blanks"])
def test_a_sentencepiece_file_with_other_rules_is_refused(rule: str, tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_SENTENCES * 20),
        model_writer=model,
        model_type="bpe",
        normalization_rule_name="nfkc" if rule == "nfkc" else "identity",
        remove_extra_whitespaces=rule == "blanks",
        byte_fallback=True,
        vocab_size=400,
        num_threads=1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(
        CheckpointError, match=r"llama.cpp would cut .* into .*rules beside pieces and scores"
    ):
        vocabulary_of(load_tokenizer_folder(tmp_path, Family.CHATGLM2), 1024)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", "glm4")
    torch.manual_seed(3)
    tuned = tune_adapter(load_official(folder), LoraSettings(rank=4, targets=("q_proj", "gate_up_proj")))
    for name, weight in tuned.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save(tmp_path / "adapter")
    result = export(job(folder, tmp_path / "out", "F32", adapter_path=str(tmp_path / "adapter")))
    assert result.max_difference < 1e-4 * result.max_logit
    merged = native(read_gguf(only_file(tmp_path / "out")), load_official(folder))
    expected = load_adapter(tmp_path / "adapter", load_official(folder)).merge_and_unload()
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-5)
    assert json.loads((tmp_path / "out" / MARKER).read_text())["adapter_path"] == str(tmp_path / "adapter")


def test_codes_are_exported_as_what_they_stand_for(tmp_path: Path) -> None:
    quantize_checkpoint(QuantizeJob("glm-tiny", "int4-g32", tmp_path / "int4"))
    export(job(tmp_path / "int4", tmp_path / "out", "F32"))
    found = read_gguf(only_file(tmp_path / "out"))
    plain = load_official(_embedded(), dtype="float32")
    weight = native(found, plain)["model.layers.0.mlp.down_proj.weight"]
    before = plain.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert 0.01 < float((weight - before).norm() / before.norm()) < 0.15
    assert len(weight[0, :32].unique()) <= 16


def test_sizes_and_positions_of_the_releases(tmp_path: Path) -> None:
    values = json.loads((make_folder(tmp_path / "in", "glm4") / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config = transformers_config(
        values | {"rope_parameters": values["rope_parameters"] | yarn}, Family.TRANSFORMERS
    )
    keys = Hyperparameters.of(config).keys()
    assert keys["glm4.rope.scaling.type"] == "yarn"
    assert keys["glm4.rope.scaling.factor"] == 4.0
    assert keys["glm4.rope.scaling.original_context_length"] == 128
    again = Hyperparameters.from_keys("glm4", keys)
    assert again.differences(Hyperparameters.of(config)) == []
    assert Hyperparameters.of(again.config(attention_bias=False, tie_word_embeddings=False)) == again
    for key in keys:
        if "scaling" not in key:
            with pytest.raises(CheckpointError, match=rf"has no key `{key}`"):
                Hyperparameters.from_keys("glm4", {name: keys[name] for name in keys if name != key})
    config.rope_parameters["mscale"] = 0.7
    with pytest.raises(ConfigError, match=r"yarn scaling sets mscale"):
        Hyperparameters.of(config)


def test_what_no_gguf_file_can_hold_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"llama.cpp has no architecture for ChatGLM-6B.*chatglm2-6b or a later"
    ):
        export(job(make_base(Family.CHATGLM, "float32"), tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"no place for a prefix.*tune with LoRA"):
        export(job("glm-tiny", tmp_path / "out", prefix_path="runs/mine"))
    folder = make_folder(tmp_path / "in", "glm")
    with pytest.raises(ConfigError, match=r"4 heads of 16 make 64, and hidden_size is 32"):
        export(job(folder, tmp_path / "out"))
    narrow = make_folder(tmp_path / "narrow", "glm4")
    content = json.loads((narrow / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "\\s+"}
    (narrow / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer.json has rules that llama.cpp has not"):
        export(job(narrow, tmp_path / "out"))
    words = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    content |= {"model": words, "pre_tokenizer": None, "post_processor": None}
    (narrow / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer.json has rules that llama.cpp has not"):
        export(job(narrow, tmp_path / "out"))
    (narrow / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no `tokenizer.json`"):
        export(job(narrow, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_settings_without_meaning_are_refused() -> None:
    base = CheckpointSettings("glm-tiny")
    with pytest.raises(ConfigError, match=r"`gguf_type` is `Q8_0`, but `format=transformers`"):
        ExportConfig(base, gguf_type="Q8_0")
    with pytest.raises(
        ConfigError, match=r"`gguf_type` is `Q4_K`, which does not exist. Did you mean `Q4_K_M`"
    ):
        ExportConfig(base, format="gguf", gguf_type="Q4_K")
    with pytest.raises(ConfigError, match=r"`dtype` is `float16`, but `format=gguf` writes what `gguf_type`"):
        ExportConfig(base, format="gguf", dtype="float16")
    with pytest.raises(ConfigError, match=r"`max_shard_mib` is 100, but `format=gguf` writes one file"):
        ExportConfig(base, format="gguf", max_shard_mib=100)


@pytest.mark.parametrize("broken", ["base", "rows"])
def test_a_file_that_says_something_else_never_appears(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "base":
        keys = Hyperparameters.keys
        monkeypatch.setattr(
            Hyperparameters, "keys", lambda self: keys(self) | {"chatglm.rope.freq_base": 10001.0}
        )
        match = "rope_base is 10001"
    else:
        monkeypatch.setattr(
            gguf_folder, "encode", lambda name, weight, kind: encode(name, weight.flip(0), kind)
        )
        match = "is off by 1.4 of its size"
    with pytest.raises(CheckpointError, match=match):
        export(job("glm-tiny", tmp_path / "out", "Q4_0"))
    assert not (tmp_path / "out").exists()


def test_a_wrong_logit_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = export_run.probe_logits
    calls: list[int] = []

    def wrong(*args: Any) -> torch.Tensor:
        calls.append(1)
        return probe(*args) * (1.5 if len(calls) == 2 else 1)

    monkeypatch.setattr(export_run, "probe_logits", wrong)
    with pytest.raises(CheckpointError, match=r"is allowed for F16 .*`gguf_type=F32`"):
        export(job("glm-tiny", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_is_replaced_when_asked(tmp_path: Path) -> None:
    export(job("glm-tiny", tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"overwrite"):
        export(job("glm-tiny", tmp_path / "out", "Q8_0"))
    export(job("glm-tiny", tmp_path / "out", "Q8_0", overwrite=True))
    assert only_file(tmp_path / "out").name == "glm-tiny-Q8_0.gguf"
    record = json.loads((tmp_path / "out" / MARKER).read_text())
    assert (record["format"], record["dtype"]) == ("gguf", "Q8_0")
