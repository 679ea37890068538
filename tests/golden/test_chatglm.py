"""Every oracle case of ChatGLM-6B on `OfficialChatGlmForCausalLM`, float32, sdpa and eager."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glmtune.models.architectures.chatglm_inputs import token_positions
from glmtune.models.load import load_official
from glmtune.models.official import OfficialChatGlmForCausalLM
from tests.golden.oracle import GRADIENT, LOSS, STEP_LOSS, Oracle, close, read_oracle

CHECKPOINTS = {"v1": "checkpoint_bin", "v1_l28": "checkpoint_safetensors", "v1_1d": "checkpoint_safetensors"}
FORWARD = [
    "plain_a",
    "plain_b",
    "mask_inside",
    "both_masks_model_positions",
    "both_masks_tokenizer_positions",
    "batch",
    "left_padded",
    "left_padded_nothing_given",
    "train_right_padded",
]
PAD = 3


def real_tokens(oracle: Oracle[OfficialChatGlmForCausalLM], case: str) -> Tensor:
    """Say which tokens are no padding; a batch without a mask has none."""
    ids = oracle.need(case, "input_ids")
    return ids != PAD if oracle(case, "attention_mask") is not None else torch.ones_like(ids).bool()


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def oracle(
    request: pytest.FixtureRequest, oracles: Path, attention: str
) -> Oracle[OfficialChatGlmForCausalLM]:
    found = read_oracle(oracles / request.param, CHECKPOINTS[request.param], attention)
    assert isinstance(found.model, OfficialChatGlmForCausalLM)
    return found


@pytest.mark.parametrize("case", FORWARD)
@torch.no_grad()
def test_forward(oracle: Oracle[OfficialChatGlmForCausalLM], case: str) -> None:
    inputs, labels = oracle.inputs(case), oracle(case, "labels")
    output = oracle.model(**inputs, labels=labels, output_hidden_states=True)
    real = real_tokens(oracle, case)
    if (expected := oracle(case, "logits")) is not None:
        close(output.logits[real], expected[real])
    if (expected := oracle(case, "logits_first_1_rows")) is not None:
        close(output.logits[:1], expected)
    for index, state in enumerate(output.hidden_states):
        if (expected := oracle(case, f"hidden.{index}")) is not None:
            close(state[real], expected[real])
    if labels is None:
        return
    assert int((labels[:, 1:] != -100).sum()) == oracle.value(case, "n_targets")
    nll = nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    close(nll, oracle.need(case, "nll"))
    assert output.loss.item() == pytest.approx(oracle.need(case, "loss").item(), abs=LOSS)
    sparing = oracle.model(**inputs, labels=labels, labelled_only=True)
    assert sparing.loss.item() == pytest.approx(output.loss.item(), abs=1e-6)
    best = output.logits[:, :-1].argmax(-1)
    assert torch.equal(sparing.predictions, best[labels[:, 1:] != -100])


@torch.no_grad()
def test_an_ordinary_mask_does_what_the_tokenizers_mask_and_positions_do(
    oracle: Oracle[OfficialChatGlmForCausalLM],
) -> None:
    inputs = oracle.inputs("left_padded")
    ids, real = inputs["input_ids"], inputs["input_ids"] != PAD
    logits = oracle.model(ids, attention_mask=real.long()).logits
    close(logits[real], oracle.need("left_padded", "logits")[real])
    positions = token_positions(ids, oracle.model.config, real)
    by_token = positions.transpose(1, 2)[real]
    assert torch.equal(by_token, inputs["position_ids"].transpose(1, 2)[real])


@pytest.mark.parametrize("case", ["not_reference_unrounded_frequencies", "not_reference_alpha_from_config"])
@torch.no_grad()
def test_two_tempting_mistakes_are_not_made(oracle: Oracle[OfficialChatGlmForCausalLM], case: str) -> None:
    wrong, right = oracle.need(case, "plain_b_logits"), oracle.need("plain_b", "logits")
    if oracle.name == "v1_l28" and "alpha" in case:
        pytest.skip("with 28 layers the constant and the depth agree")
    found = oracle.model(oracle.need("plain_b", "input_ids")).logits
    assert (found - wrong).abs().max() > 3 * (found - right).abs().max()


@pytest.mark.parametrize("case", ["kv_single", "kv_left"])
@torch.no_grad()
def test_cache_steps(oracle: Oracle[OfficialChatGlmForCausalLM], case: str) -> None:
    ids, prefill = oracle.inputs(case)["input_ids"], oracle.value(case, "prefill_len")
    given = {
        name: value
        for name in ("attention_mask", "position_ids")
        if (value := oracle(case, f"prefill_{name}")) is not None
    }
    output = oracle.model(ids[:, :prefill], **given, use_cache=True)
    logits, real = [output.logits], ids != PAD
    for step in range(prefill, ids.shape[1]):
        inputs = oracle.model.prepare_inputs_for_generation(
            ids[:, : step + 1],
            next_sequence_length=1,
            attention_mask=real[:, : step + 1].long(),
            cache=output.cache,
        )
        positions = oracle.need(case, "step_position_ids")[..., step - prefill]
        assert torch.equal(inputs["position_ids"], positions[..., None])
        output = oracle.model(**inputs, use_cache=True)
        logits.append(output.logits)
    close(torch.cat(logits, dim=1)[real], oracle.need(case, "logits_steps")[real])
    layers = output.cache.layers
    for name, layer in (("first", layers[0]), ("last", layers[-1])):
        for kind, actual in (("key", layer.keys), ("value", layer.values)):
            expected = oracle.need(case, f"past_{kind}_{name}").transpose(0, 1)  # official: length first
            close(actual.transpose(1, 2)[real], expected[real])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("case", ["generate", "generate_left"])
def test_generate(
    oracle: Oracle[OfficialChatGlmForCausalLM], case: str, use_cache: bool, recwarn: pytest.WarningsRecorder
) -> None:
    inputs = oracle.inputs(case)
    settings = {"max_new_tokens": 16, "return_dict_in_generate": True, "output_logits": True}
    official = oracle.model.generate(**inputs, **settings, use_cache=use_cache)
    ids = inputs["input_ids"]
    plain = oracle.model.generate(ids, attention_mask=(ids != PAD).long(), **settings, use_cache=use_cache)
    for output in (official, plain):
        assert torch.equal(output.sequences, oracle.need(case, "sequences"))
        if (scores := oracle(case, "scores")) is not None:
            close(torch.stack(output.logits, dim=1), scores)
    assert not [str(w.message) for w in recwarn if "generat" in str(w.message).lower()]


def test_generate_stops_at_the_end_id_and_fills_with_pad(oracle: Oracle[OfficialChatGlmForCausalLM]) -> None:
    inputs = oracle.inputs("generate_eos")
    eos = oracle.value("generate_eos", "eos_token_id")
    sequences = oracle.model.generate(**inputs, max_new_tokens=16, eos_token_id=eos)
    assert torch.equal(sequences, oracle.need("generate_eos", "sequences"))


def test_beam_search(oracle: Oracle[OfficialChatGlmForCausalLM]) -> None:
    ids, expected = oracle.inputs("generate_beam")["input_ids"], oracle.need("generate_beam", "sequences")
    positions = token_positions(ids, oracle.model.config)
    for given in ({}, {"position_ids": positions}):
        sequences = oracle.model.generate(ids, **given, num_beams=3, max_new_tokens=12)
        assert torch.equal(sequences, expected)


@torch.no_grad()
def test_rotary_table(oracle: Oracle[OfficialChatGlmForCausalLM]) -> None:
    rotary, positions = oracle.model.transformer.rotary_emb, oracle.need("rope", "positions")
    assert torch.equal(rotary.inv_freq(), oracle.need("rope", "inv_freq"))
    streams = positions.expand(1, oracle.model.config.num_position_streams, -1)
    for table, name in zip(rotary(torch.zeros(1), streams), ("cos", "sin"), strict=True):
        for stream in range(table.shape[3]):
            close(table[0, :, 0, stream], oracle.need("rope", name))


def test_full_fine_tuning(oracles: Path, attention: str) -> None:
    folder = oracles / "v1"
    model = load_official(
        folder / "checkpoint_bin", dtype=torch.float32, device="cpu", attn_implementation=attention
    ).train()
    cases = json.loads((folder / "finetune.json").read_text())["cases"]
    tensors = load_file(folder / "finetune.safetensors")
    settings = cases["full.train20"]["values"]["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    losses, norms = [], []
    for step in range(20):
        loss = model(
            **{key: tensors[f"train_batch.{step % 2}.{key}"] for key in ("input_ids", "labels")}
        ).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            check_gradients(model, tensors)
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        losses.append(loss.detach())
        optimizer.step()
    close(torch.stack(losses), tensors["full.train20.losses"], STEP_LOSS)
    torch.testing.assert_close(torch.stack(norms), tensors["full.train20.grad_norms"], rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.no_grad():
        probe = load_file(folder / "cases.safetensors")["plain_b.input_ids"]
        close(model(probe).logits[:, -4:], tensors["full.train20.final_probe_logits_last4"])


def check_gradients(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {key.split("grad0.")[1]: value for key, value in tensors.items() if "grad0." in key}
    rows = expected.pop("embedding_and_head_first_8_rows")
    close(found["transformer.word_embeddings.weight"][:8], rows, GRADIENT * rows.abs().max().item())
    assert len(expected) >= 8
    for name, gradient in expected.items():
        close(found[name], gradient, GRADIENT * gradient.abs().max().item())
