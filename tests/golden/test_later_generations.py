"""Every oracle case of the second generation and later, on `GlmForCausalLM`, float32, sdpa and eager."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.writing import official_tensors
from glmtune.models.later import OfficialGlmForCausalLM
from glmtune.models.load import load_official
from tests.golden.oracle import LOSS, STEP_LOSS, Oracle, close, read_oracle

CHECKPOINTS = {
    "v2": "checkpoint_bin",
    "v2_32k": "checkpoint_safetensors",
    "glm3": "checkpoint_bin",
    "glm3_32k": "checkpoint_safetensors",
    "glm4": "checkpoint_safetensors",
}
FORWARD = [
    "plain_a",
    "plain_b",
    "batch",
    "left_padded",
    "train_right_padded",
    "explicit_positions",
    "far_positions",
]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def oracle(request: pytest.FixtureRequest, oracles: Path, attention: str) -> Oracle[OfficialGlmForCausalLM]:
    return read_oracle(oracles / request.param, CHECKPOINTS[request.param], attention)


def real(case_mask: Tensor | None, ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if case_mask is None else case_mask.bool()


@pytest.mark.parametrize("case", FORWARD)
@torch.no_grad()
def test_forward(oracle: Oracle[OfficialGlmForCausalLM], case: str) -> None:
    inputs, labels = oracle.inputs(case), oracle(case, "labels")
    last_block: list[Tensor] = []
    hook = oracle.model.model.layers[-1].register_forward_hook(lambda *call: last_block.append(call[2]))
    output = oracle.model(**inputs, labels=labels, output_hidden_states=True)
    hook.remove()
    mask = real(inputs.get("attention_mask"), inputs["input_ids"])
    if (expected := oracle(case, "logits")) is not None:
        close(output.logits[mask], expected[mask])
    if (expected := oracle(case, "logits_first_1_rows")) is not None:
        close(output.logits[:1], expected)
    for index, state in enumerate((*output.hidden_states[:-1], last_block[0])):
        if (expected := oracle(case, f"hidden.{index}")) is not None:
            close(state[mask], expected[mask])
    if labels is None:
        return
    assert int((labels[:, 1:] != -100).sum()) == oracle.value(case, "n_targets")
    logits = output.logits[:, :-1].flatten(0, 1)
    nll = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none").view_as(
        labels[:, 1:]
    )
    # A target right after left padding is predicted from a padding row: an accident.
    asked_by_real = mask[:, :-1]
    close(nll[asked_by_real], oracle.need(case, "nll")[asked_by_real])
    if asked_by_real[labels[:, 1:] != -100].all():
        assert output.loss.item() == pytest.approx(oracle.need(case, "loss").item(), abs=LOSS)


@pytest.mark.parametrize("case", ["kv_single", "kv_left"])
@torch.no_grad()
def test_cache_steps(oracle: Oracle[OfficialGlmForCausalLM], case: str) -> None:
    inputs, prefill = oracle.inputs(case), oracle.value(case, "prefill_len")
    mask = real(inputs.get("attention_mask"), inputs["input_ids"])
    length = mask.shape[1]
    cache, logits = None, []
    for begin, end in [(0, prefill), *((step, step + 1) for step in range(prefill, length))]:
        step = {name: value[:, :end] for name, value in inputs.items() if name == "attention_mask"}
        step |= {name: value[:, begin:end] for name, value in inputs.items() if name != "attention_mask"}
        output = oracle.model(**step, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    close(torch.cat(logits, dim=1)[mask], oracle.need(case, "logits_steps")[mask])
    for name, layer in (("first", cache.layers[0]), ("last", cache.layers[-1])):
        for kind, actual in (("key", layer.keys), ("value", layer.values)):
            expected = oracle.need(case, f"past_{kind}_{name}")
            if oracle.name != "glm4":  # [length, batch, groups, size] in the older releases
                expected = expected.permute(1, 2, 0, 3)
            close(actual.transpose(1, 2)[mask], expected.transpose(1, 2)[mask])


@pytest.mark.parametrize("case", ["generate", "generate_left"])
def test_generate(
    oracle: Oracle[OfficialGlmForCausalLM], case: str, recwarn: pytest.WarningsRecorder
) -> None:
    inputs = oracle.inputs(case, positions=False)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    output = oracle.model.generate(
        **inputs, max_new_tokens=16, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(output.sequences, oracle.need(case, "sequences"))
    if (scores := oracle(case, "scores")) is not None:
        close(torch.stack(output.logits, dim=1), scores)
    assert not [str(w.message) for w in recwarn if "generat" in str(w.message).lower()]


def test_generate_stops_at_the_end_id_and_fills_with_pad(oracle: Oracle[OfficialGlmForCausalLM]) -> None:
    eos = oracle.value("generate_eos", "eos_token_id")
    inputs = oracle.inputs("generate_eos", positions=False)
    sequences = oracle.model.generate(**inputs, max_new_tokens=16, eos_token_id=eos)
    assert torch.equal(sequences, oracle.need("generate_eos", "sequences"))


def test_beam_search(oracle: Oracle[OfficialGlmForCausalLM]) -> None:
    inputs = oracle.inputs("generate_beam", positions=False)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    sequences = oracle.model.generate(**inputs, num_beams=3, max_new_tokens=12)
    assert torch.equal(sequences, oracle.need("generate_beam", "sequences"))


@torch.no_grad()
def test_rotary_table(oracle: Oracle[OfficialGlmForCausalLM]) -> None:
    positions = oracle.need("rope", "positions")
    cos, sin = oracle.model.model.rotary_emb(torch.zeros(1), positions[None])
    for table, name in ((cos, "cos"), (sin, "sin")):
        expected = oracle.need("rope", name)
        close(table[0, :, : expected.shape[1]], expected)


@torch.no_grad()
def test_rotary_table_in_bfloat16_is_only_rounded(oracle: Oracle[OfficialGlmForCausalLM]) -> None:
    if oracle("rope_bf16", "positions") is None:
        pytest.skip("the release runs in float16")
    positions = oracle.need("rope_bf16", "positions")
    cos, _ = oracle.model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions[None])
    expected = oracle.need("rope_bf16", "cos")
    torch.testing.assert_close(cos[0, :, : expected.shape[1]].float(), expected.float(), atol=0, rtol=0)


@torch.no_grad()
def test_sequence_classification(oracle: Oracle[OfficialGlmForCausalLM]) -> None:
    if "sequence_classification" not in oracle.cases:
        pytest.skip(f"{oracle.name} has no classifier")
    case = "sequence_classification"
    hidden = oracle.model.model(**oracle.inputs(case)).last_hidden_state
    weight, bias = oracle.need(case, "classifier_weight"), oracle.need(case, "classifier_bias")
    logits = nn.functional.linear(hidden[:, -1], weight, bias)
    close(logits, oracle.need(case, "logits"))
    loss = nn.functional.cross_entropy(logits, oracle.need(case, "labels"))
    assert loss.item() == pytest.approx(oracle.need(case, "loss").item(), abs=LOSS)


@pytest.mark.parametrize("name", ["v2", "v2_32k", "glm3", "glm4"])
def test_full_fine_tuning(name: str, oracles: Path, attention: str) -> None:
    folder = oracles / name
    source = folder / CHECKPOINTS[name]
    model = load_official(source, dtype=torch.float32, device="cpu", attn_implementation=attention).train()
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
        keys = ("input_ids", "labels", "attention_mask", "position_ids")
        loss = model(**{key: tensors[f"train_batch.{step % 2}.{key}"] for key in keys}).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            check_gradients(model, tensors)
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        losses.append(loss.detach())
        optimizer.step()
    close(torch.stack(losses), tensors["full.train20.losses"].view(-1), STEP_LOSS)
    torch.testing.assert_close(
        torch.stack(norms), tensors["full.train20.grad_norms"].view(-1), atol=0, rtol=5e-5
    )
    model.eval()
    with torch.no_grad():
        probe = load_file(folder / "cases.safetensors")["plain_b.input_ids"]
        close(model(probe).logits[:, -4:], tensors["full.train20.final_probe_logits_last4"])


def check_gradients(model: OfficialGlmForCausalLM, tensors: dict[str, Tensor]) -> None:
    native = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    official = official_tensors(native, model.config)
    expected = {key.split("grad0.")[1]: value for key, value in tensors.items() if "grad0." in key}
    assert len(expected) >= 8
    for name, gradient in expected.items():
        close(official[name], gradient, 1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("option", ["no_qkv_bias", "one_group", "separate_heads"])
@torch.no_grad()
def test_unusual_switches_that_are_handled(option: str, oracles: Path, attention: str) -> None:
    folder = oracles / "v2_options" / option
    model = load_official(folder, dtype=torch.float32, device="cpu", attn_implementation=attention)
    tensors = load_file(folder / "cases.safetensors")
    output = model(tensors["batch.input_ids"], labels=tensors["batch.labels"])
    close(output.logits, tensors["batch.logits"])
    assert output.loss.item() == pytest.approx(tensors["batch.loss"].item(), abs=LOSS)
    names = ("input_ids", "attention_mask", "position_ids")
    logits = model(**{name: tensors[f"left_padded.{name}"] for name in names}).logits
    mask = tensors["left_padded.attention_mask"].bool()
    close(logits[mask], tensors["left_padded.logits"][mask])


@pytest.mark.parametrize(
    ("option", "switch"),
    [
        ("layer_norm", "rmsnorm is False"),
        ("linear_bias", "add_bias_linear is True"),
        ("no_final_norm", "post_layer_norm is False"),
        ("residual_after_norm", "apply_residual_connection_post_layernorm is True"),
    ],
)
def test_unusual_switches_that_are_refused_by_name(option: str, switch: str, oracles: Path) -> None:
    with pytest.raises(CheckpointError, match=switch):
        load_official(oracles / "v2_options" / option)
