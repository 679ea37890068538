from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import GlmForCausalLM

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.describe import describe
from glmtune.models.devices import choose_device, choose_dtype
from glmtune.models.load import load_official
from glmtune.models.releases.families import Family

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "models"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "device", "stored", "size", "dtype"),
    [
        (None, CPU, "float16", 10**6, torch.float32),
        ("auto", CPU, "float16", 6 * 10**9, torch.bfloat16),
        ("auto", CPU, torch.bfloat16, 10**6, torch.bfloat16),
        ("auto", CPU, None, 10**6, torch.float32),
        ("auto", CUDA, "float16", 10**6, torch.float16),
        ("auto", CUDA, "bfloat16", 6 * 10**9, torch.bfloat16),
        ("float16", CPU, "bfloat16", 10**6, torch.float16),
        (torch.float32, CUDA, "float16", 6 * 10**9, torch.float32),
    ],
)
def test_choice_of_dtype(
    asked: str | torch.dtype | None, device: torch.device, stored: str | None, size: int, dtype: torch.dtype
) -> None:
    assert choose_dtype(asked, device, stored=stored, num_parameters=size) == dtype


def test_unknown_dtype_and_device() -> None:
    with pytest.raises(ConfigError, match=r"`model.dtype` is `int8`"):
        load_official(GOLDEN / "chatglm2", dtype=torch.int8)
    with pytest.raises(ConfigError, match=r"`model.device` is `cuda:99`, but PyTorch sees \d+ CUDA devices"):
        load_official(GOLDEN / "chatglm2", device="cuda:99")
    with pytest.raises(ConfigError, match=r"`model.device` is `gpu`"):
        choose_device("gpu")
    assert choose_device("cpu") == CPU
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_what_comes_back() -> None:
    model = load_official(str(GOLDEN / "chatglm2"), device="cpu")
    assert isinstance(model, GlmForCausalLM)
    assert model.family is Family.CHATGLM2
    assert model.source == str(GOLDEN / "chatglm2")
    assert model.dtype == torch.float32
    assert model.config.dtype == torch.float32
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_without_a_stored_dtype_the_weights_tell(tmp_path: Path) -> None:
    folder = tmp_path / "glm-4-copy"
    shutil.copytree(GOLDEN / "glm4", folder)
    file = folder / "config.json"
    file.write_text(file.read_text().replace('  "torch_dtype": "bfloat16",\n', ""))
    assert load_official(folder, device="cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_rotary_frequencies_survive_casts(cast: str) -> None:
    model = load_official(GOLDEN / "chatglm2-32k", device="cpu")
    before = model.model.rotary_emb.inv_freq.clone()
    getattr(model, cast)()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_the_padding_embedding_gets_its_gradient() -> None:
    model = load_official(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    ids = torch.tensor([[0, 5, 6]])
    model(ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert gradient[0].abs().sum() > 0


def test_generation_defaults(recwarn: pytest.WarningsRecorder) -> None:
    model = load_official(GOLDEN / "glm4", dtype="float32", device="cpu")
    settings = model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id, settings.do_sample) == ([40, 41, 42], 40, False)
    ids = torch.tensor([[5, 6, 7]])
    first = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    assert torch.equal(first, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5))
    assert not [str(w.message) for w in recwarn]


def test_an_explicit_family_wins_over_names() -> None:
    assert load_official(GOLDEN / "chatglm2", family="codegeex2").family is Family.CODEGEEX2
    with pytest.raises(ConfigError, match=r"`model.family` is `nothing`"):
        load_official(GOLDEN / "chatglm2", family="nothing")
    with pytest.raises(CheckpointError, match="family: chatglm"):
        load_official(GOLDEN / "chatglm2", family="chatglm")


def test_a_configuration_without_a_family_is_not_guessed_at(tmp_path: Path) -> None:
    model = load_official(GOLDEN / "chatglm2", device="cpu")
    del model.config.glmtune_family
    words = r"GlmConfig does not say which release line.*no `glmtune_family`.*native_config.*chatglm2, .*glm4"
    with pytest.raises(CheckpointError, match=words):
        _ = model.family
    with pytest.raises(CheckpointError, match=words):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    model.config.glmtune_family = "chatglm-2"
    with pytest.raises(
        CheckpointError, match=r"`glmtune_family` of the configuration is `chatglm-2`.*chatglm2"
    ):
        _ = model.family


def test_fingerprint_ignores_the_dtype_and_sees_the_weights() -> None:
    prints = {
        load_official(GOLDEN / "chatglm2", dtype=dtype).fingerprint()
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert len(prints) == 1
    assert len(next(iter(prints))) == 64
    model = load_official(GOLDEN / "chatglm2", dtype="float32")
    model.add_module("prefix_encoder", torch.nn.Linear(2, 2))
    assert model.fingerprint() in prints
    assert load_official(GOLDEN / "chatglm2-32k", dtype="float32").fingerprint() not in prints
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert model.fingerprint() not in prints


def test_an_adapter_changes_neither_fingerprint_nor_base() -> None:
    from peft import LoraConfig, get_peft_model

    model = load_official(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    before = model.fingerprint()
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    ids = torch.tensor([[3, 4, 5]])
    tuned(ids, labels=ids).loss.backward()
    assert model.fingerprint() == before
    assert tuned.merge_and_unload().fingerprint() == before


def test_loading_twice_shares_nothing() -> None:
    first, second = (load_official(GOLDEN / "chatglm2", dtype="float32") for _ in range(2))
    with torch.no_grad():
        first.lm_head.weight.zero_()
    assert second.lm_head.weight.abs().sum() > 0


def test_description_reads_headers_only() -> None:
    described = describe(GOLDEN / "chatglm3")
    assert (described.family, described.num_layers, described.hidden_size) == (Family.CHATGLM3, 3, 24)
    assert (described.num_heads, described.num_kv_heads, described.head_dim) == (4, 1, 8)
    assert (described.vocab_size, described.max_positions, described.dtype, described.quantization_bit) == (
        48,
        512,
        "float16",
        0,
    )
    model = load_official(GOLDEN / "chatglm3")
    assert described.num_parameters == model.num_parameters()
    assert described.num_bytes == 2 * described.num_parameters
    assert described.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert describe(GOLDEN / "glm4").dtype == "bfloat16"
    assert describe(GOLDEN / "per-head").num_kv_heads == 4


def test_description_of_first_generation_and_quantized(oracles: Path) -> None:
    first = describe(oracles / "v1" / "checkpoint_bin")
    assert (first.family, first.num_heads, first.head_dim, first.max_positions) == (
        Family.CHATGLM,
        4,
        12,
        2048,
    )
    assert describe(oracles / "v2" / "int4").quantization_bit == 4
    with pytest.raises(CheckpointError, match=r"is quantized \(4 bits\).* `glmtune.load_model`"):
        load_official(oracles / "v2" / "int4")


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    gradients = []
    for checkpointing in (False, True):
        model = load_official(GOLDEN / "chatglm2", dtype="float32", device="cpu").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    model = load_official(GOLDEN / "chatglm2", dtype="float32", device="cuda")
    expected = load_official(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    assert model.fingerprint() == expected.fingerprint()
    with torch.no_grad():
        torch.testing.assert_close(model(ids.cuda()).logits.cpu(), expected(ids).logits, atol=1e-4, rtol=0)
    assert load_official(GOLDEN / "chatglm2").dtype == torch.float16
