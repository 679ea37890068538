"""Exports on the oracle models and the tiny base: what is written answers as its source, or does not appear."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from glmtune.adapter import load_adapter
from glmtune.errors import CheckpointError, ConfigError
from glmtune.export import export as export_run
from glmtune.export.export import MARKER, export
from glmtune.export.source import ExportJob
from glmtune.loading import load_base, load_model, load_tokenizer
from glmtune.messages import Message
from glmtune.models.checkpoints.shards import OpenShards, read_records
from glmtune.models.load import load_official
from glmtune.models.templates.renderer import template_for
from glmtune.prefix.checkpoint import find_prefix, save_prefix
from glmtune.prefix.init import build_prefix_encoder
from glmtune.prefix.settings import PrefixSettings
from glmtune.storage.manifest import write_manifest
from glmtune.switch.files import save_switch
from glmtune.switch.model import switch_of
from glmtune.switch.rule import Switch
from glmtune.training.adapt import tune_adapter
from glmtune.training.settings import LoraSettings
from tests.models.checkpoints.stored import read_tensor
from tests.switch.cases import FACTS

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "models"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def job(source: Path | str, form: str, folder: Path, **changes: object) -> ExportJob:
    values = {"family": None, "prefix_path": None, "adapter_path": None, "dtype": None}
    values |= {"max_shard_bytes": 2**30, "overwrite": False} | changes
    return ExportJob(source=str(source), format=form, output_dir=folder, **values)  # pyright: ignore[reportArgumentType]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: read_tensor(record) for name, record in read_records(folder).items() if "inv_freq" not in name
    }


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    """A LoRA adapter whose second matrix is not zero, in the projections and in the MLP."""
    torch.manual_seed(3)
    tuned = tune_adapter(
        load_official(tiny_base), LoraSettings(rank=4, targets=("q_proj", "v_proj", "gate_up_proj"))
    )
    for name, weight in tuned.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["chatglm2", "chatglm2-32k", "chatglm3", "glm4", "per-head"])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 6000])
def test_transformers_reads_every_generation_without_our_code(
    name: str, max_shard_bytes: int, tmp_path: Path
) -> None:
    result = export(
        job(
            GOLDEN / name,
            "transformers",
            tmp_path / "out",
            max_shard_bytes=max_shard_bytes,
            dtype=torch.float32,
        )
    )
    assert result.max_difference <= result.limit < 1e-4 * result.max_logit
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__module__ == "transformers.models.glm.modeling_glm"
    expected = load_official(GOLDEN / name, dtype="float32")(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-6, rtol=0)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["architectures"] == ["GlmForCausalLM"]
    assert "auto_map" not in values
    assert [key for key in values if key.startswith(("glmtune", "fused"))] == ["glmtune_family"]
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (max_shard_bytes == 6000)


def test_files_are_not_opened_for_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On network disks every open is a question to a server."""
    opened: list[Path] = []
    stream = OpenShards.stream

    def noted(shards: OpenShards, file: Path) -> BinaryIO:
        if file not in shards._streams:
            opened.append(file)
        return stream(shards, file)

    monkeypatch.setattr(OpenShards, "stream", noted)
    export(job(GOLDEN / "chatglm3", "transformers", tmp_path / "out", max_shard_bytes=6000))
    counts = Counter(file.name for file in opened)
    # for headers of the source twice (its types, its tensors), of the export once; and once for all tensors
    assert {name: 3 if name.endswith("of-00002.safetensors") else 2 for name in counts} == dict(counts)
    assert len(counts) > 3


@pytest.mark.parametrize("name", ["v1", "v2", "v2_32k", "glm3", "glm3_32k", "glm4"])
def test_official_exports_are_bit_equal(name: str, oracles: Path, tmp_path: Path) -> None:
    source = oracles / name / "checkpoint_safetensors"
    family = {"v2_32k": "chatglm2-32k", "glm3_32k": "chatglm3-32k"}.get(name)
    result = export(job(source, "official", tmp_path / "out", family=family, max_shard_bytes=20_000))
    assert result.max_difference == 0
    before, after = stored(source), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before
    )
    again = load_official(tmp_path / "out", dtype="float32")
    assert again.fingerprint() == load_official(source, dtype="float32", family=family).fingerprint()


@pytest.mark.parametrize("form", ["transformers", "official"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_an_adapter_is_merged(
    form: str, dtype: torch.dtype | None, tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    result = export(job(tiny_base, form, tmp_path / "out", adapter_path=str(adapter), dtype=dtype))
    expected = load_adapter(adapter, load_official(tiny_base))(IDS).logits
    reader = AutoModelForCausalLM.from_pretrained if form == "transformers" else load_official
    found = reader(tmp_path / "out", dtype=torch.float32)(IDS).logits
    assert not torch.allclose(found, load_official(tiny_base)(IDS).logits, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=max(result.limit, 1e-5), rtol=0)
    assert result.dtype == str(dtype or torch.float32).removeprefix("torch.")
    merged, base = stored(tmp_path / "out"), stored(tiny_base)
    if form == "official" and dtype is None:
        changed = {
            name.split(".")[-3] + "." + name.split(".")[-2]
            for name in base
            if not base[name].equal(merged[name])
        }
        assert changed == {"self_attention.query_key_value", "mlp.dense_h_to_4h"}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("chatglm", "official"),
        ("chatglm3", "official"),
        ("chatglm3", "transformers"),
        ("glm4", "transformers"),
    ],
)
def test_adapters_of_other_generations_are_merged(name: str, form: str, tmp_path: Path) -> None:
    source = GOLDEN / name
    tuned = tune_adapter(load_official(source, dtype="float32"), LoraSettings(rank=2))
    for key, weight in tuned.model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save(tmp_path / "adapter")
    settings = {"adapter_path": str(tmp_path / "adapter"), "dtype": torch.float32}
    export(job(source, form, tmp_path / "out", **settings))
    reader = AutoModelForCausalLM.from_pretrained if form == "transformers" else load_official
    plain = load_official(source, dtype="float32")
    ids = export_run.probe_ids(plain.config)
    before, expected = plain(ids).logits, load_adapter(tmp_path / "adapter", plain)(ids).logits
    found = reader(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert not torch.allclose(found, before, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # sums in another order


@pytest.mark.parametrize("name", ["v1", "v2", "glm3"])
@pytest.mark.parametrize("kind", ["ptuning_embedding", "ptuning_projection"])
@pytest.mark.parametrize("form", ["official", "prefix"])
def test_a_prefix_goes_out_as_the_official_script_leaves_it(
    name: str, kind: str, form: str, oracles: Path, tmp_path: Path
) -> None:
    source, prefix = oracles / name / "checkpoint_bin", oracles / name / kind
    result = export(job(source, form, tmp_path / "out", prefix_path=str(prefix)))
    assert result.max_difference == 0
    folder = tmp_path / "out" / "prefix_encoder" if form == "official" else tmp_path / "out"
    before = torch.load(prefix / "pytorch_model.bin", weights_only=True)
    after = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    values = json.loads((folder / "config.json").read_text())
    assert (values["pre_seq_len"], values["prefix_projection"]) == (8, kind == "ptuning_projection")
    base = tmp_path / "out" if form == "official" else source
    assert find_prefix(folder).name == "pytorch_model.bin"
    exported = load_model(base, dtype="float32", prefix=folder)
    plain = load_model(source, dtype="float32", prefix=prefix)
    ids = export_run.probe_ids(plain.config)
    assert torch.equal(exported(ids).logits, plain(ids).logits)


def test_the_native_tokenizer_writes_the_same_prompts(tmp_path: Path) -> None:
    export(job("glm-tiny", "transformers", tmp_path / "out"))
    native, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer("glm-tiny")
    turns = [("user", "你好"), ("assistant", "Hello  there!"), ("user", "3 + 4 = ?")]
    expected = template_for(ours).encode_prompt(ours, [Message(*turn) for turn in turns])  # pyright: ignore[reportArgumentType]
    found = native.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], add_generation_prompt=True
    )
    assert found["input_ids"] == expected
    assert native.eos_token_id == 2
    text = "plain  text\n世界"
    assert native.decode(native(text)["input_ids"], skip_special_tokens=True) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.generation_config.eos_token_id == 2
    again = load_official("glm-tiny", dtype="float32").generate(torch.tensor([expected]), max_new_tokens=8)
    assert torch.equal(model.generate(torch.tensor([expected]), max_new_tokens=8), again)


def test_what_a_format_cannot_hold_is_refused(oracles: Path, tiny_base: Path, tmp_path: Path) -> None:
    prefix = str(oracles / "v2" / "ptuning_embedding")
    with pytest.raises(ConfigError, match=r"no place for a prefix.*format=official.*format=prefix.*LoRA"):
        export(job(oracles / "v2" / "checkpoint_bin", "transformers", tmp_path / "out", prefix_path=prefix))
    model = load_base(tiny_base, device="cpu")
    encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=3, gate=True))
    gated = save_prefix(encoder, tmp_path / "gated")
    for form in ("official", "prefix"):
        with pytest.raises(ConfigError, match=rf"`{gated}` was tuned with `prefix.gate=true`.*LoRA"):
            export(job(tiny_base, form, tmp_path / "out", prefix_path=str(gated.parent)))
    shutil.rmtree(gated.parent)
    with pytest.raises(ConfigError, match=r"no class for ChatGLM-6B.*format=official"):
        export(job(oracles / "v1" / "checkpoint_bin", "transformers", tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"`format` is `prefix`, but no prefix is given"):
        export(job(tiny_base, "prefix", tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"`prefix_path` and `adapter_path` are both set"):
        export(job(tiny_base, "official", tmp_path / "out", prefix_path="a", adapter_path="b"))
    assert list(tmp_path.iterdir()) == []


def test_only_earlier_exports_are_replaced(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    export(job(tiny_base, "official", folder))
    record = json.loads((folder / MARKER).read_text())
    assert record["source"] == str(tiny_base)
    assert record["max_difference"] == 0
    with pytest.raises(ConfigError, match=r"holds an earlier export.*overwrite=true"):
        export(job(tiny_base, "transformers", folder))
    export(job(tiny_base, "transformers", folder, overwrite=True))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "glm"
    (folder / MARKER).unlink()
    with pytest.raises(ConfigError, match=r"no export of glmtune.*never replaced"):
        export(job(tiny_base, "transformers", folder, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_may_not_replace_its_own_source(tiny_base: Path, tmp_path: Path) -> None:
    export(job(tiny_base, "official", tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"holds the source"):
        export(job(tmp_path / "out", "official", tmp_path / "out", overwrite=True))


def test_an_export_that_answers_otherwise_never_appears(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_run.write_shards

    def damaging(folder: Path, tensors: object, **rest: object) -> int:
        real_get = type(tensors).__getitem__
        spoilt = SimpleNamespace(value=0)

        def get(self: object, name: str) -> torch.Tensor:
            tensor = real_get(self, name)
            spoilt.value += name.endswith("o_proj.weight")
            return -tensor if name.endswith("o_proj.weight") else tensor

        with monkeypatch.context() as patch:
            patch.setattr(type(tensors), "__getitem__", get)
            written = real(folder, tensors, **rest)  # pyright: ignore[reportArgumentType]
        assert spoilt.value
        return written

    monkeypatch.setattr(export_run, "write_shards", damaging)
    with pytest.raises(CheckpointError, match=r"does not answer as its source: logits differ by up to"):
        export(job(tiny_base, "transformers", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_or_kind_is_refused(
    tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"No adapter at .*adapter_model\.safetensors"):
        export(job(tiny_base, "official", tmp_path / "out", adapter_path=str(tmp_path)))
    write_manifest(adapter, {"base_fingerprint": "0" * 64})
    with pytest.raises(CheckpointError, match=r"trained on another base.*0000000000000000"):
        export(job(tiny_base, "official", tmp_path / "out", adapter_path=str(adapter)))
    own = load_official(tiny_base).fingerprint()
    write_manifest(adapter, {"base_fingerprint": own})
    export(job(tiny_base, "official", tmp_path / "out", adapter_path=str(adapter)))
    with pytest.raises(CheckpointError, match=r"does not fit|cannot be used"):
        load_adapter(adapter, load_official(GOLDEN / "glm4"), check_base=False)
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(values | {"use_dora": True}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json has .* bytes, not"):
        load_adapter(adapter, load_official(tiny_base))
    (adapter / "checkpoint.json").unlink()  # changed on purpose
    with pytest.raises(
        CheckpointError, match=r"only plain LoRA is supported:\n- use_dora = True, but it must be False"
    ):
        load_adapter(adapter, load_official(tiny_base))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("v1/int4", "official"),
        ("v1/int4_embeddings", "official"),
        ("v2/int8", "official"),
        ("v2/int4", "transformers"),
    ],
)
def test_quantized_sources_are_exported_as_what_their_codes_stand_for(
    name: str, form: str, oracles: Path, tmp_path: Path
) -> None:
    from glmtune.loading import load_base as load_any

    source = load_any(oracles / name, dtype="float32", device="cpu")
    special = [source.config.gmask_token_id, source.config.bos_token_id] if name.startswith("v1") else []
    ids = torch.tensor([[5, 9, 13, *special, 11]])
    exported = export(job(oracles / name, form, tmp_path / "out", dtype=torch.float32))
    assert exported.dtype == "float32"
    if form == "official":
        again = load_any(exported.folder, dtype="float32", device="cpu")
        assert again.quantization is None
        assert "quantization_bit" not in json.loads((exported.folder / "config.json").read_text())
    else:
        again = AutoModelForCausalLM.from_pretrained(exported.folder)
        assert "glmtune_quantization" not in json.loads((exported.folder / "config.json").read_text())
    with torch.no_grad():
        expected, found = source(input_ids=ids).logits, again(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_adapter_is_merged_into_dequantized_weights(oracles: Path, tmp_path: Path) -> None:
    from glmtune.loading import load_base as load_any

    base = load_any(oracles / "v2" / "int4", dtype="float32", device="cpu")
    tuned = tune_adapter(base, LoraSettings(rank=2))
    for key, weight in tuned.model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.1)
    (tmp_path / "adapter").mkdir()
    tuned.save(tmp_path / "adapter")
    ids = torch.tensor([[5, 9, 13, 7, 11]])
    with torch.no_grad():
        expected = tuned.model.eval()(input_ids=ids).logits
    done = export(
        job(oracles / "v2" / "int4", "official", tmp_path / "out", adapter_path=str(tmp_path / "adapter"),
            dtype=torch.float32)
    )  # fmt: skip
    with torch.no_grad():
        found = load_any(done.folder, dtype="float32", device="cpu")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["transformers", "official", "tuned"])
def test_a_scale_is_written_into_what_comes_out(
    form: str, tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    settings = {"adapter_path": str(adapter), "adapter_scale": 0.5}
    result = export(job(tiny_base, form, tmp_path / "out", **settings))
    expected = load_adapter(adapter, load_official(tiny_base), scale=0.5)(IDS).logits
    if form == "tuned":
        found = load_adapter(tmp_path / "out", load_official(tiny_base))(IDS).logits
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        before = json.loads((adapter / "adapter_config.json").read_text())
        assert values["lora_alpha"] == before["lora_alpha"] / 2
        assert {**values, "lora_alpha": 0} == {**before, "lora_alpha": 0}
    else:
        reader = AutoModelForCausalLM.from_pretrained if form == "transformers" else load_official
        found = reader(tmp_path / "out", dtype=torch.float32)(IDS).logits
        torch.testing.assert_close(found, expected, atol=max(result.limit, 1e-5), rtol=0)
    assert not torch.allclose(found, load_adapter(adapter, load_official(tiny_base))(IDS).logits, atol=1e-3)
    assert json.loads((tmp_path / "out" / MARKER).read_text())["adapter_scale"] == 0.5


def test_an_adapter_that_peft_reads_with_patterns_and_roots(
    tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    """PEFT itself reads the export; its own base is remembered, and another one refused."""
    from peft import PeftModel

    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "use_rslora": True, "alpha_pattern": {"q_proj": 3}}))
    write_manifest(adapter, {"base_fingerprint": load_official(tiny_base).fingerprint(), "step": 9})
    export(job(tiny_base, "tuned", tmp_path / "out", adapter_path=str(adapter), adapter_scale=2.0))
    expected = load_adapter(adapter, load_official(tiny_base), scale=2.0)(IDS).logits
    found = PeftModel.from_pretrained(load_official(tiny_base), str(tmp_path / "out"))(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match=r"trained on another base"):
        load_adapter(tmp_path / "out", load_official("glm-tiny"))


@pytest.mark.parametrize("kind", ["prefix", "lora"])
def test_a_switch_goes_out_in_our_own_files_alone(
    kind: str, tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = load_official(tiny_base)
    switch = Switch(torch.ones(model.config.hidden_size), -0.5, FACTS)
    if kind == "lora":
        save_switch(switch, adapter)
        settings = {"adapter_path": str(adapter)}
    else:
        encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=3))
        save_prefix(encoder, tmp_path / "run", switch=switch)
        settings = {"prefix_path": str(tmp_path / "run")}
    assert export(job(tiny_base, "tuned", tmp_path / "out", **settings)).left_out == ""
    where = {"prefix" if kind == "prefix" else "adapter": tmp_path / "out"}
    found = switch_of(load_model(tiny_base, dtype="float32", **where))  # pyright: ignore[reportArgumentType]
    assert found is not None
    assert found.fingerprint == switch.fingerprint
    lost = export(job(tiny_base, "official", tmp_path / "official", **settings))
    assert f"The {'prefix' if kind == 'prefix' else 'adapter'} has a switch" in lost.left_out
    assert "`format=tuned`" in lost.left_out


@pytest.mark.parametrize("kind", ["ptuning_embedding", "ptuning_projection"])
def test_a_strength_goes_out_in_our_own_file_alone(kind: str, oracles: Path, tmp_path: Path) -> None:
    source, prefix = oracles / "v2" / "checkpoint_bin", oracles / "v2" / kind
    settings = {"prefix_path": str(prefix), "prefix_strength": 0.5}
    result = export(job(source, "tuned", tmp_path / "out", **settings))
    assert result.max_difference == 0
    expected = load_model(source, dtype="float32", prefix=prefix, prefix_strength=0.5)
    found = load_model(source, dtype="float32", prefix=tmp_path / "out")
    ids = export_run.probe_ids(expected.config)
    assert torch.equal(found(ids).logits, expected(ids).logits)
    twice = load_model(source, dtype="float32", prefix=tmp_path / "out", prefix_strength=2)
    whole = load_model(source, dtype="float32", prefix=prefix)
    torch.testing.assert_close(twice(ids).logits, whole(ids).logits, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"has no place for one.*format=tuned"):
        export(job(source, "prefix", tmp_path / "again", prefix_path=str(tmp_path / "out")))
    for form in ("official", "prefix"):
        with pytest.raises(ConfigError, match=r"`prefix_strength` is 0.5, .*no place for one.*format=tuned"):
            export(job(source, form, tmp_path / "again", **settings))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_strength_of_an_export(tiny_base: Path, tmp_path: Path) -> None:
    for name, of in (("prefix_strength", "prefix_path"), ("adapter_scale", "adapter_path")):
        with pytest.raises(ConfigError, match=rf"`{name}` is 0, which is the base"):
            export(job(tiny_base, "tuned", tmp_path / "out", **{of: "run", name: 0}))
        with pytest.raises(ConfigError, match=rf"`{name}` is 2, but no .*`{of}=RUN`"):
            export(job(tiny_base, "official", tmp_path / "out", **{name: 2}))
    with pytest.raises(ConfigError, match=r"`format` is `tuned`, but nothing tuned is given"):
        export(job(tiny_base, "tuned", tmp_path / "out"))
