"""Folders in transformers' format against transformers itself: its own classes on the same files, float32.

The references run with ``eager`` or with transformers' plain ``sdpa`` under a name of its own, as glmtune takes
over the name ``sdpa`` in a process that loads one of its models.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from glmtune.inference.engine.engine import Engine, EngineSettings
from glmtune.models.architectures import grouped_attention
from glmtune.models.later import OfficialGlm4ForCausalLM, OfficialGlmForCausalLM
from glmtune.models.load import load_official
from glmtune.prefix.attach import attach_prefix, freeze_base
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from tests.models.transformers_folders import KINDS, make_folder

CLOSE = 2e-5
"""What the order of summation changes in float32; logits are of the size of 1."""
PAD, IGNORED = 0, -100
PLAIN = "transformers_sdpa"


@pytest.fixture(scope="module", autouse=True)
def _plain_attention() -> None:
    AttentionInterface.register(PLAIN, sdpa_attention_forward)
    AttentionMaskInterface.register(PLAIN, sdpa_mask)


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Large weights: with the usual ones of 0.02 a model of two layers hardly looks at anything.
    place = tmp_path_factory.mktemp("transformers") / request.param
    return make_folder(place, request.param, initializer_range=0.2)


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


def reference(folder: Path, attention: str = "eager") -> Any:
    name = PLAIN if attention == "sdpa" else attention
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=name)
    assert type(model).__module__.startswith("transformers.models.glm")
    return model.eval()


def ours(folder: Path, attention: str = "sdpa") -> Any:
    return load_official(folder, dtype="float32", device="cpu", attn_implementation=attention)


def rows(*lengths: int, side: str = "left") -> dict[str, Tensor]:
    """Random ids, padded to one length."""
    torch.manual_seed(1)
    width = max(lengths)
    ids = torch.randint(5, 300, (len(lengths), width))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padding = slice(0, width - length) if side == "left" else slice(length, width)
        mask[row, padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def with_positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def close(found: Tensor, expected: Tensor, tolerance: float = CLOSE) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance * max(1, float(expected.abs().max())), rtol=0)


def test_the_classes_are_transformers_own(folder: Path) -> None:
    model, plain = ours(folder), reference(folder)
    expected = OfficialGlm4ForCausalLM if plain.config.model_type == "glm4" else OfficialGlmForCausalLM
    assert type(model) is expected
    assert isinstance(model, type(plain))
    weights = dict(plain.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    is_tied = KINDS[folder.name][3]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_padding(folder: Path, attention: str, side: str) -> None:
    model, plain = ours(folder, attention), reference(folder, attention)
    one = rows(23)
    close(model(**one).logits, plain(**one).logits)
    padded = with_positions(rows(17, 4, 11, side=side))
    found, expected = model(**padded), plain(**padded)
    real = padded["attention_mask"].bool()
    close(found.logits[real], expected.logits[real])
    for row, (ids, mask) in enumerate(zip(padded["input_ids"], real, strict=True)):
        alone = model(input_ids=ids[mask][None]).logits[0]
        close(found.logits[row][mask], alone)


def test_loss_and_gradients(folder: Path, attention: str) -> None:
    model, plain = ours(folder, attention).train(), reference(folder, attention).train()
    inputs = rows(17, 9, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    labels[:, :4] = IGNORED
    expected = plain(**inputs, labels=labels).loss
    expected.backward()
    for options in ({}, {"labelled_only": True}):
        model.zero_grad()
        loss = model(**inputs, labels=labels, **options).loss
        close(loss.detach(), expected.detach())
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        for name, weight in plain.named_parameters():
            close(gradients[name], weight.grad, CLOSE * float(weight.grad.abs().max()))


def test_checkpointed_gradients_are_the_same(folder: Path, attention: str) -> None:
    model, inputs = ours(folder, attention).train(), rows(17, 9, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    found: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(19,), (19, 6, 12)])
def test_token_by_token_equals_one_pass(folder: Path, attention: str, lengths: tuple[int, ...]) -> None:
    model, plain = ours(folder, attention), reference(folder, attention)
    inputs = with_positions(rows(*lengths))
    expected, real = plain(**inputs).logits, inputs["attention_mask"].bool()
    cache, steps = None, []
    for begin, end in [(0, 7), *((step, step + 1) for step in range(7, 19))]:
        output = model(
            input_ids=inputs["input_ids"][:, begin:end],
            attention_mask=inputs["attention_mask"][:, :end],
            position_ids=inputs["position_ids"][:, begin:end],
            cache=cache,
            use_cache=True,
        )
        cache = output.cache
        steps.append(output.logits)
    close(torch.cat(steps, dim=1)[real], expected[real])


@torch.no_grad()
def test_generate_and_the_engine_write_what_transformers_writes(folder: Path) -> None:
    model, plain = ours(folder), reference(folder)
    inputs = rows(12, 5, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    expected = plain.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)
    prompts = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    engine = Engine(model, EngineSettings(batch_size=2, min_shared_gain=6, read_tokens=8))
    made = {
        text.index: list(text.token_ids)
        for text in engine.generate(prompts, max_new_tokens=12, stop_ids=(), decode=lambda ids: str(ids))
    }
    assert [made[row] for row in range(3)] == expected[:, 12:].tolist()


@torch.no_grad()
def test_grouped_attention_is_plain_sdpa_but_for_rounding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(module: nn.Module, query: Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(query.shape[2])
        return sdpa_attention_forward(module, query, *rest, **options)

    model, plain = ours(folder), ours(folder)
    plain.set_attn_implementation(PLAIN)
    monkeypatch.setattr(grouped_attention, "sdpa_attention_forward", counted)
    ids = rows(70)["input_ids"]
    found, expected = (each(input_ids=ids[:, :-1], use_cache=True) for each in (model, plain))
    close(found.logits, expected.logits)
    found, expected = (
        each(input_ids=ids[:, -1:], cache=output.cache, use_cache=True)
        for each, output in ((model, found), (plain, expected))
    )
    close(found.logits, expected.logits)
    assert calls == []  # neither the prompt nor the step went to the stock attention


# ---- P-Tuning v2 ----


def with_prefix(
    model: PreTrainedModel, encoder: PrefixEncoder, inputs: dict[str, Tensor], labels: Tensor | None = None
) -> Any:
    """Hand a prefix to transformers' own model as keys and values that were computed before."""
    states, (batch, _) = encoder(), inputs["input_ids"].shape
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(states):
        # Keys as rotated at position 0, which leaves them as they are; tokens count from 0 behind them.
        expanded = [part.transpose(0, 1).expand(batch, -1, -1, -1) for part in (keys, values)]
        cache.update(*expanded, layer)
    mask = inputs["attention_mask"]
    seen = torch.cat([mask.new_ones(batch, encoder.pre_seq_len), mask], dim=1)
    options = {"attention_mask": seen, "past_key_values": cache, "labels": labels}
    return model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], **options)


@pytest.fixture(params=["embedding", "projection"])
def encoder(request: pytest.FixtureRequest, folder: Path) -> PrefixEncoder:
    torch.manual_seed(7)
    width = 24 if request.param == "projection" else None
    return PrefixEncoder(prefix_shape(ours(folder).config), pre_seq_len=6, hidden_size=width, dropout=0.0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prefix_is_past_key_values(folder: Path, attention: str, encoder: PrefixEncoder, side: str) -> None:
    model, inputs = ours(folder, attention), with_positions(rows(15, 4, 9, side=side))
    expected = with_prefix(reference(folder, attention), encoder, inputs).logits
    without = model(**inputs).logits
    attach_prefix(model, copy.deepcopy(encoder))
    real = inputs["attention_mask"].bool()
    close(model(**inputs).logits[real], expected[real])
    assert (without - expected)[real].abs().max() > 1e-2


def test_gradients_of_a_prefix(folder: Path, attention: str, encoder: PrefixEncoder) -> None:
    inputs = with_positions(rows(15, 9, side="right"))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    theirs, plain = copy.deepcopy(encoder), reference(folder, attention).requires_grad_(False)
    expected = with_prefix(plain, theirs, inputs, labels).loss
    expected.backward()
    model, own = ours(folder, attention), copy.deepcopy(encoder)
    attach_prefix(model, own)
    freeze_base(model)
    model.train()
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        own.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        close(loss.detach(), expected.detach())
        loss.backward()
        for (name, weight), (_, other) in zip(own.named_parameters(), theirs.named_parameters(), strict=True):
            assert weight.grad is not None, name
            assert other.grad is not None, name
            close(weight.grad, other.grad, CLOSE * float(other.grad.abs().max()))
    assert all(weight.grad is None for name, weight in model.named_parameters() if "prefix" not in name)


@torch.no_grad()
def test_a_prefix_in_generate_and_in_the_engine(folder: Path, encoder: PrefixEncoder) -> None:
    model, plain = ours(folder), reference(folder)
    prompts = [rows(length)["input_ids"][0] for length in (12, 5, 9)]
    attach_prefix(model, copy.deepcopy(encoder))
    expected: list[list[int]] = []
    for prompt in prompts:  # the whole text again for every token
        ids = prompt
        for _ in range(10):
            inputs = with_positions({"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])})
            chosen = with_prefix(plain, encoder, inputs).logits[0, -1].argmax()
            ids = torch.cat([ids, chosen[None]])
        expected.append(ids[len(prompt) :].tolist())
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    found = [model.generate(prompt[None], **options)[0, len(prompt) :].tolist() for prompt in prompts]
    assert found == expected
    engine = Engine(model, EngineSettings(batch_size=2, min_shared_gain=6, read_tokens=8))
    given = [prompt.tolist() for prompt in prompts]
    made = {
        text.index: list(text.token_ids)
        for text in engine.generate(given, max_new_tokens=10, stop_ids=(), decode=lambda ids: str(ids))
    }
    assert [made[row] for row in range(3)] == expected


# ---- config.json ----


@torch.no_grad()
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
        {"rope_theta": 500000.0},
        {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ],
)
def test_rotary_settings_of_older_files_mean_what_transformers_takes_them_for(
    folder: Path, rope: dict[str, Any], tmp_path: Path
) -> None:
    """Files of transformers 4 have ``rope_theta`` and its like beside each other instead of ``rope_parameters``."""
    place = make_folder(tmp_path / folder.name, folder.name, initializer_range=0.2)
    file = place / "config.json"
    values = json.loads(file.read_text())
    del values["rope_parameters"]
    file.write_text(json.dumps(values | rope))
    ids = rows(40)["input_ids"]
    close(ours(place)(ids).logits, reference(place)(ids).logits)
    again = tmp_path / "again"
    ours(place).save_pretrained(again)
    assert torch.equal(reference(again)(ids).logits, reference(place)(ids).logits)
    assert torch.equal(ours(again)(ids).logits, ours(place)(ids).logits)
    assert ours(again).fingerprint() == ours(place).fingerprint()
