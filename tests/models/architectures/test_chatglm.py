"""What `OfficialChatGlmForCausalLM` does beyond the released cases: loading, saving, and the ways transformers uses it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmtune.errors import CheckpointError, ConfigError, DataError, ShapeError
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.architectures.chatglm_inputs import continue_positions, token_positions
from glmtune.models.checkpoints.config import native_config
from glmtune.models.describe import describe
from glmtune.models.load import build_model, load_official
from glmtune.models.official import OfficialChatGlmForCausalLM
from glmtune.models.releases.families import Family
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.init import build_prefix_encoder
from glmtune.prefix.settings import PrefixSettings

MASK, GMASK, SOP, EOP = 40, 41, 44, 45
ROW = [5, 9, 30, 12, GMASK, SOP, 7, 31, EOP]


def tiny_config(**changes: Any) -> ChatGlmConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "mask_token_id": MASK,
        "gmask_token_id": GMASK,
        "bos_token_id": SOP,
        "eos_token_id": EOP,
    }
    return ChatGlmConfig(**sizes | changes)


def make_model(attention: str = "sdpa", **changes: Any) -> OfficialChatGlmForCausalLM:
    config = tiny_config(**changes)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = OfficialChatGlmForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if weight.dim() == 1 else 0.0))
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A saved tiny model."""
    make_model().save_pretrained(tmp_path / "chatglm-tiny")
    return tmp_path / "chatglm-tiny"


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


# --- checkpoints


def test_all_file_forms_hold_the_same_model(oracles: Path) -> None:
    places = ("checkpoint_bin", "checkpoint_bin_sharded", "checkpoint_safetensors")
    models = [load_official(oracles / "v1" / place, dtype="float32", device="cpu") for place in places]
    assert len({model.fingerprint() for model in models}) == 1
    for name, weight in models[0].named_parameters():
        assert all(torch.equal(weight, dict(model.named_parameters())[name]) for model in models)
    assert models[0].family is Family.CHATGLM
    assert models[0].lm_head.weight is models[0].get_input_embeddings().weight


def test_saving_writes_official_names_and_comes_back(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["transformer.word_embeddings.weight"])
    assert "transformer.layers.1.attention.query_key_value.bias" in stored
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["model_type"], config["inner_hidden_size"], config["gmask_token_id"]) == (
        "chatglm",
        48,
        GMASK,
    )
    loaded, original = load_official(checkpoint, device="cpu"), make_model()
    assert loaded.fingerprint() == original.fingerprint()
    ids = torch.tensor([ROW])
    assert torch.equal(loaded(ids).logits, original(ids).logits)


def test_a_checkpoint_without_the_copy_of_the_embedding_loads(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    assert load_official(checkpoint).fingerprint() == make_model().fingerprint()


def test_tensors_that_do_not_fit_are_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.final_layernorm.bias"]
    tensors["transformer.layers.0.mlp.dense_h_to_4h.weight"] = torch.zeros(32, 48)
    tensors["transformer.layers.0.attention.rotary_emb.inv_freq"] = torch.zeros(2)
    tensors["transformer.layers.7.zebra"] = torch.zeros(2)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load_official(checkpoint)
    words = str(caught.value)
    assert "1 missing: transformer.final_layernorm.bias" in words
    assert "1 leftover, which the model has no place for: transformer.layers.7.zebra" in words
    assert "dense_h_to_4h.weight is [32, 48] in model.safetensors, but config.json asks for [48, 32]" in words


def test_rotary_tables_of_a_checkpoint_are_ignored(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    noise = {"transformer.layers.0.attention.rotary_emb.inv_freq": torch.randn(2)}
    save_file(load_file(file) | noise, file)
    ids = torch.tensor([ROW])
    assert torch.equal(load_official(checkpoint, device="cpu")(ids).logits, make_model()(ids).logits)


def test_description(oracles: Path) -> None:
    facts = describe(oracles / "v1" / "checkpoint_bin_sharded")
    assert (facts.family, facts.num_layers, facts.num_kv_heads, facts.vocab_size) == (
        Family.CHATGLM,
        2,
        4,
        176,
    )
    assert (facts.dtype, facts.quantization_bit, len(facts.files)) == ("float16", 0, 3)


def test_fingerprint_sees_weights_and_rules_but_no_dtype(checkpoint: Path) -> None:
    first = load_official(checkpoint, dtype="bfloat16")
    assert first.fingerprint() == load_official(checkpoint, dtype="float32").fingerprint()
    with torch.no_grad():
        first.lm_head.weight.neg_()
    assert first.fingerprint() != make_model().fingerprint()
    assert make_model(position_rule="march_2023").fingerprint() != make_model().fingerprint()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_transformers_loads_the_official_folder_itself(checkpoint: Path, device_map: Any) -> None:
    model = OfficialChatGlmForCausalLM.from_pretrained(checkpoint, device_map=device_map, dtype=torch.float32)
    ids = torch.tensor([ROW])
    assert_close(model(ids.to(model.device)).logits.cpu(), make_model()(ids).logits)


def test_layers_spread_over_devices(checkpoint: Path, tmp_path: Path) -> None:
    places: dict[str, Any] = {"transformer.word_embeddings": "cpu", "transformer.layers.0": "disk"}
    places |= {"transformer.layers.1": "cpu", "transformer.final_layernorm": "cpu", "lm_head": "cpu"}
    places["transformer.rotary_emb"] = "cpu"
    model = OfficialChatGlmForCausalLM.from_pretrained(
        checkpoint, device_map=places, offload_folder=str(tmp_path / "offload"), dtype=torch.float32
    )
    ids = torch.tensor([ROW])
    assert_close(model(ids).logits, make_model()(ids).logits)


def test_the_vocabulary_of_march_2023(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "inner_hidden_size": 8, "num_layers": 1, "num_attention_heads": 2}
    official = sizes | {"vocab_size": 150528, "max_sequence_length": 64, "model_type": "chatglm"}
    official |= {"bos_token_id": 150004, "eos_token_id": 150005}  # this file names no mask ids and no pad
    model = build_model(native_config(official, Family.CHATGLM))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(official))
    loaded = load_official(tmp_path, device="cpu")
    assert loaded.config.position_rule == "march_2023"
    settings = loaded.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (150005, 20003)
    ids = torch.tensor([[20003, 20010, 20011, 150001, 150004], [20012, 20010, 20011, 150001, 150004]])
    mask = (ids != 20003).long()
    alone = loaded(ids[:1, 1:]).logits[:, -1]
    assert_close(loaded(ids, attention_mask=mask).logits[:1, -1], alone)
    assert loaded.generate(ids, attention_mask=mask, max_new_tokens=2).shape == (2, 7)


# --- positions and mask


def test_positions_of_the_march_2023_revision() -> None:
    ids = torch.tensor([ROW])
    final = token_positions(ids, tiny_config())
    assert final[0].tolist() == [[0, 1, 2, 3, 4, 4, 4, 4, 4], [0, 0, 0, 0, 0, 1, 2, 3, 4]]
    march = token_positions(ids, tiny_config(position_rule="march_2023"))
    assert march[0].tolist() == [[0, 1, 2, 3, 4, 5, 4, 4, 4], [0, 0, 0, 0, 0, 1, 2, 3, 4]]
    inside = torch.tensor([[5, MASK, 9, SOP, 7]])  # without gMASK both revisions agree
    rules = [token_positions(inside, tiny_config(position_rule=rule)) for rule in ("final", "march_2023")]
    assert rules[0][0].tolist() == [[0, 1, 2, 1, 1], [0, 0, 0, 1, 2]]
    assert torch.equal(*rules)


def test_positions_go_on_where_given_ones_end() -> None:
    inside = [5, MASK, 9, SOP, 7, 8, 6]
    for rule in ("final", "march_2023"):
        for two_streams in (True, False):
            config = tiny_config(position_rule=rule, position_encoding_2d=two_streams)
            for row in (ROW, inside):
                ids = torch.tensor([row])
                whole = token_positions(ids, config)
                for given in range(row.index(SOP) + 1, len(row) + 1):
                    assert torch.equal(continue_positions(whole[..., :given], ids, config), whole)
    foreign = torch.tensor([[[3, 4, 5], [0, 0, 1]]])  # rows without a mask token, numbered by their user
    assert continue_positions(foreign, torch.tensor([[7, 8, 9, 9, 9]]), tiny_config()).tolist() == [
        [[3, 4, 5, 5, 5], [0, 0, 1, 2, 3]]
    ]


def test_a_model_of_march_2023_goes_on_as_it_reads_the_whole_text() -> None:
    """Every step's logits with a cache and given positions are those of the whole text read at once."""
    for rule in ("final", "march_2023"):
        model = make_model(position_rule=rule)
        prompt = torch.tensor([ROW[: ROW.index(SOP) + 1]])
        given = token_positions(prompt, model.config)
        made = model.generate(
            prompt, position_ids=given, max_new_tokens=6, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        for step, logits in enumerate(made.logits):
            whole = model(made.sequences[:, : prompt.shape[1] + step]).logits[:, -1]
            torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_context_sees_both_directions_and_the_answer_is_causal() -> None:
    model = make_model()
    ids = torch.tensor([ROW])
    before = model(ids).logits[0]
    changed = {place: ids.clone() for place in (0, 3, 7)}
    for place, row in changed.items():
        row[0, place] = 20
    moved = {place: (model(row).logits[0] - before).abs().amax(-1) > 1e-6 for place, row in changed.items()}
    assert moved[0].all()
    assert moved[3].all()
    assert moved[7].tolist() == [False] * 7 + [True, True]


@torch.no_grad()
@pytest.mark.parametrize("prefix", [False, True])
def test_rows_of_one_context_length_make_no_square_mask(
    prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, eager = make_model(), make_model("eager")
    if prefix:
        encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=3))
        attach_prefix(model, encoder)
        attach_prefix(eager, copy.deepcopy(encoder))
    kernel, masks = torch.nn.functional.scaled_dot_product_attention, []

    def recording(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(None if attn_mask is None else tuple(attn_mask.shape[-2:]))
        return kernel(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    prompts = torch.tensor([ROW[:6], [8, 9, 31, 12, GMASK, SOP]])
    assert_close(model(prompts, attention_mask=torch.ones_like(prompts)).logits, eager(prompts).logits)
    assert set(masks) == {None}
    masks.clear()
    whole = torch.tensor([ROW, [8, 9, 31, 12, GMASK, *ROW[5:]]])
    assert_close(model(whole).logits, eager(whole).logits)
    past = 3 if prefix else 0
    assert set(masks) == {None, (4, 9 + past)}
    masks.clear()
    assert_close(model.generate(prompts, max_new_tokens=4), eager.generate(prompts, max_new_tokens=4))
    assert set(masks) == {None}


def test_rows_that_are_no_rows_of_this_model() -> None:
    model = make_model()
    with pytest.raises(DataError, match=rf"Row 1 of input_ids has no sop \({SOP}\)"):
        model(torch.tensor([[GMASK, SOP], [GMASK, 5]]))
    with pytest.raises(
        DataError, match=rf"Row 0 of input_ids has no gMASK \({GMASK}\) and no MASK \({MASK}\)"
    ):
        model(torch.tensor([[5, SOP]]))
    with pytest.raises(ShapeError, match=r"position_ids is \[1, 9\], but this ChatGLM-6B takes 2 numbers"):
        model(torch.tensor([ROW]), position_ids=torch.arange(9)[None])
    with pytest.raises(ShapeError, match=r"must be boolean .* is torch\.int64"):
        model(torch.tensor([ROW]), attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.long))
    cache = model(torch.tensor([ROW]), use_cache=True).cache
    with pytest.raises(DataError, match="position_ids are missing"):
        model(torch.tensor([[7]]), cache=cache)
    embeddings = model.get_input_embeddings()(torch.tensor([ROW]))
    with pytest.raises(ShapeError, match="Only input_ids tell where the context ends"):
        model(inputs_embeds=embeddings, position_ids=token_positions(torch.tensor([ROW]), model.config))
    with pytest.raises(ConfigError, match="Exactly one of input_ids"):
        model()


@torch.no_grad()
def test_embeddings_instead_of_ids_with_the_official_mask_and_positions() -> None:
    model, ids = make_model(), torch.tensor([ROW])
    blocked = torch.ones(9, 9).triu(1).bool()
    blocked[:, :5] = False
    logits = model(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=blocked[None, None],
        position_ids=token_positions(ids, model.config),
    ).logits
    assert_close(logits, model(ids).logits)


# --- generation


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_caches_generate_the_same(settings: dict[str, Any]) -> None:
    model = make_model()
    ids = torch.tensor([[3, 3, *ROW[:6]], [8, 9, 30, 31, 12, 13, GMASK, SOP]])
    mask = (ids != 3).long()
    expected = [
        model.generate(row[keep][None], max_new_tokens=8) for row, keep in zip(ids, mask.bool(), strict=True)
    ]
    found = model.generate(ids, attention_mask=mask, max_new_tokens=8, **settings)
    for row, alone in zip(found, expected, strict=True):
        new = alone[0, -8:] if EOP not in alone[0] else alone[0, mask[0].sum() :]
        assert row[8:][: len(new)].tolist() == new.tolist()


def test_several_tokens_per_step_and_a_cache_that_is_handed_in() -> None:
    model, ids = make_model(), torch.tensor([ROW[:6]])
    settings: dict[str, Any] = {"eos_token_id": None, "do_sample": False}
    expected = model.generate(ids, max_new_tokens=10, **settings)
    looked_up = model.generate(ids, max_new_tokens=10, prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(looked_up, expected)
    cache = model(ids, use_cache=True).cache
    again = model.generate(expected[:, :8], cache=cache, max_new_tokens=8, **settings)
    assert torch.equal(again, expected)


@torch.no_grad()
def test_the_old_name_of_the_cache_is_obeyed_not_ignored() -> None:
    model, ids = make_model(), torch.tensor([ROW])
    whole = model(ids).logits[:, -1]
    kept = model(ids[:, :-1], use_cache=True)
    assert kept.past_key_values is kept.cache
    place = token_positions(ids, model.config)[..., -1:]
    with pytest.warns(FutureWarning, match="past_key_values"):
        step = model(ids[:, -1:], past_key_values=kept.cache, position_ids=place)
    assert_close(step.logits[:, -1], whole)


def test_a_prompt_cut_into_pieces_is_refused() -> None:
    # The first piece would not see the rest of the context.
    with pytest.raises(DataError, match="has no sop"):
        make_model().generate(torch.tensor([ROW[:6]]), max_new_tokens=2, prefill_chunk_size=2)


def test_sampling_follows_the_seed_and_returns_several() -> None:
    model, ids = make_model(), torch.tensor([ROW[:6]])
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6, "temperature": 1.5}
    draws = []
    for _ in range(2):
        torch.manual_seed(4)
        draws.append(model.generate(ids, **settings))
    assert torch.equal(*draws)
    assert draws[0].shape[0] == 3
    assert len({tuple(row) for row in draws[0].tolist()}) > 1


@torch.no_grad()
def test_only_the_last_logits_are_formed_in_generation() -> None:
    model, ids = make_model(), torch.tensor([ROW])
    shapes = []
    hook = model.lm_head.register_forward_hook(
        lambda _module, _inputs, output: shapes.append(output.shape[1])
    )
    model.generate(ids[:, :6], max_new_tokens=3)
    hook.remove()
    assert set(shapes) == {1}
    assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


# --- attention, training


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_kernels_without_a_prefix_mask_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"is `{name}`, but it cannot run ChatGLM-6B"):
        make_model(name)
    model = make_model()
    with pytest.raises(ConfigError, match=f"is `{name}`"):
        model.set_attn_implementation(name)


@torch.no_grad()
def test_eager_and_sdpa_agree_and_eager_shows_its_weights() -> None:
    ids = torch.tensor([ROW])
    output = make_model("eager")(ids, output_attentions=True)
    assert_close(output.logits, make_model("sdpa")(ids).logits)
    weights = output.attentions[0][0]
    assert weights.shape == (4, 9, 9)
    assert weights[:, 0, 4].min() > 0
    assert weights[:, 0, 5:].max() == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    ids, gradients = torch.tensor([ROW]), []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids, labels=ids).loss.backward()
        gradients.append(model.transformer.layers[0].mlp.dense_h_to_4h.weight.grad)
    assert torch.equal(*gradients)


def test_gradients_of_embedding_and_head_add_up() -> None:
    model = make_model()
    model(torch.tensor([ROW]), labels=torch.tensor([ROW])).loss.backward()
    gradient = model.transformer.word_embeddings.weight.grad
    assert gradient is model.lm_head.weight.grad
    assert (gradient.abs().sum(-1) > 0).all()  # the head reaches rows that the text does not use
    assert sum(weight.numel() for weight in model.parameters()) == model.num_parameters()


def test_low_rank_adapters_train_and_merge(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model, ids = make_model(), torch.tensor([ROW])
    before = model.fingerprint()
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["query_key_value"], init_lora_weights=False
    )
    tuned = get_peft_model(model, adapter)
    tuned(ids, labels=ids).loss.backward()
    trained = [name for name, weight in tuned.named_parameters() if weight.grad is not None]
    assert len(trained) == 4
    assert all("lora_" in name for name in trained)
    tuned.eval()
    assert model.fingerprint() == before
    expected, text = tuned(ids).logits, tuned.generate(input_ids=ids[:, :6], max_new_tokens=5)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert_close(again(ids).logits, expected)
    merged = tuned.merge_and_unload()
    assert_close(merged(ids).logits, expected, 1e-4)
    assert torch.equal(merged.generate(ids[:, :6], max_new_tokens=5), text)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double().float()])
def test_frequencies_survive_casts(
    cast: Callable[[OfficialChatGlmForCausalLM], OfficialChatGlmForCausalLM],
) -> None:
    model = make_model()
    before = model.transformer.rotary_emb.inv_freq()
    assert torch.equal(cast(model).transformer.rotary_emb.inv_freq(), before)
    assert torch.equal(before, before.half().float())
    assert model(torch.tensor([ROW])).logits.dtype == model.dtype


def test_a_copied_folder_of_any_name_loads(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "my own model")
    assert load_official(tmp_path / "my own model").family is Family.CHATGLM
