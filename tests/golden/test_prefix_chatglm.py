"""Parity with the released prefix-tuning code of ChatGLM-6B, at the tolerances of the golden set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from glmtune.errors import CheckpointError
from glmtune.models.architectures.chatglm_inputs import token_positions
from glmtune.models.architectures.chatglm_rotary import rotate
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.load import load_official
from glmtune.models.official import OfficialChatGlmForCausalLM
from glmtune.prefix.attach import attach_prefix, freeze_base
from glmtune.prefix.checkpoint import export_official_prefix, load_prefix, save_prefix
from glmtune.prefix.encoder import PrefixEncoder
from glmtune.prefix.init import build_prefix_encoder, text_rows
from glmtune.prefix.settings import PrefixSettings
from tests.golden.conftest import Golden
from tests.golden.oracle import close

LOGITS, LOSS, GRADIENT, TRAINING, PREFIX = 1e-4, 2e-5, 1e-5, 5e-5, 1e-4
PAD = 3


@pytest.fixture(scope="module")
def cases(golden: Callable[[str], Golden]) -> Golden:
    return golden("v1")


@pytest.fixture
def base(cases: Golden) -> OfficialChatGlmForCausalLM:
    return _base(cases, "sdpa")


@pytest.fixture(params=["sdpa", "eager"])
def tuned(request: pytest.FixtureRequest, cases: Golden, kind: str) -> OfficialChatGlmForCausalLM:
    model = _base(cases, request.param)
    encoder = load_prefix(cases.folder / f"ptuning_{kind}", model)
    encoder.dropout = 0.0
    attach_prefix(model, encoder)
    return model


@pytest.fixture(params=["plain", "checkpointed"])
def trainable(
    request: pytest.FixtureRequest, tuned: OfficialChatGlmForCausalLM
) -> OfficialChatGlmForCausalLM:
    freeze_base(tuned)
    tuned.train()
    if request.param == "checkpointed":
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
    return tuned


def _base(cases: Golden, attention: str) -> OfficialChatGlmForCausalLM:
    source = cases.folder / "checkpoint_bin"
    model = load_official(source, dtype=torch.float32, device="cpu", attn_implementation=attention)
    assert isinstance(model, OfficialChatGlmForCausalLM)
    return model


def _prefix(model: OfficialChatGlmForCausalLM) -> PrefixEncoder:
    return model.transformer.prefix_encoder


@torch.no_grad()
def test_keys_and_values_have_the_official_layout(
    cases: Golden, kind: str, tuned: OfficialChatGlmForCausalLM
) -> None:
    expected = cases.case(f"{kind}.prefix")["kv"]  # [layers, 2, prefix, batch, heads, size]
    close(_prefix(tuned)(), expected[:, :, :, 0], 1e-6)
    states = _prefix(tuned).layer_states(expected.shape[3], torch.float32)
    stacked = torch.stack([torch.stack(pair) for pair in states])
    close(stacked.permute(0, 1, 4, 2, 3, 5), expected, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain_b", "left_padded", "train_right_padded"])
def test_forward(cases: Golden, kind: str, tuned: OfficialChatGlmForCausalLM, case: str) -> None:
    expected, inputs = cases.case(f"{kind}.{case}"), cases.inputs(f"{kind}.{case}")
    output = tuned(**inputs)
    real = inputs["input_ids"] != PAD
    if "logits" in expected:
        close(output.logits[real], expected["logits"][real], LOGITS)
        plain = tuned(inputs["input_ids"], attention_mask=real.long()).logits
        close(plain[real], expected["logits"][real], LOGITS)
    close(output.loss, expected["loss"][0], LOSS)
    losses = nn.functional.cross_entropy(
        output.logits[:, :-1].transpose(1, 2), inputs["labels"][:, 1:], reduction="none"
    )
    close(losses, expected["nll"], LOGITS)


@torch.no_grad()
def test_decoding_with_a_cache(cases: Golden, kind: str, tuned: OfficialChatGlmForCausalLM) -> None:
    case = cases.case(f"{kind}.kv_left")
    prefill = int(cases.values[f"{kind}.kv_left"]["prefill_len"])  # pyright: ignore[reportArgumentType]
    ids = case["input_ids"]
    real = ids != PAD
    output = tuned(
        ids[:, :prefill],
        attention_mask=case["prefill_attention_mask"],
        position_ids=case["prefill_position_ids"],
        use_cache=True,
    )
    logits = [output.logits]
    for step in range(prefill, ids.shape[1]):
        output = tuned(
            ids[:, step : step + 1],
            attention_mask=real[:, : step + 1],
            position_ids=case["step_position_ids"][..., step - prefill, None],
            cache=output.cache,
        )
        logits.append(output.logits)
    close(torch.cat(logits, dim=1)[real], case["logits_steps"][real], LOGITS)
    # The released cache starts with the prefix; ours holds the tokens alone.
    expected = case["past_key_last"].transpose(0, 1)
    prefix_key = _prefix(tuned).layer_states(len(ids), torch.float32)[-1][0].transpose(1, 2)
    close(prefix_key, expected[:, : prefix_key.shape[1]], LOGITS)
    keys = output.cache.layers[-1].keys.transpose(1, 2)
    close(keys[real], expected[:, prefix_key.shape[1] :][real], LOGITS)


@torch.no_grad()
@pytest.mark.parametrize("case", ["generate", "generate_left"])
def test_greedy_generation(cases: Golden, kind: str, tuned: OfficialChatGlmForCausalLM, case: str) -> None:
    expected, inputs = cases.case(f"{kind}.{case}")["sequences"], cases.inputs(f"{kind}.{case}")
    ids = inputs["input_ids"]
    for given in (inputs, {"input_ids": ids, "attention_mask": (ids != PAD).long()}):
        sequences = tuned.generate(**given, max_new_tokens=16, eos_token_id=None)
        assert torch.equal(sequences, expected)


def test_gradient(cases: Golden, kind: str, trainable: OfficialChatGlmForCausalLM) -> None:
    case = cases.case(f"{kind}.gradient")
    loss = trainable(**cases.inputs(f"{kind}.train_right_padded")).loss
    close(loss.detach(), case["loss"][0], LOSS)
    loss.backward()
    named = dict(_prefix(trainable).named_parameters())
    gradients = {name.removeprefix("grad."): value for name, value in case.items() if "grad." in name}
    assert gradients
    for name, expected in gradients.items():
        found = named[name].grad
        assert found is not None
        close(found, expected, GRADIENT * float(expected.abs().max()))


def test_only_what_trains_in_the_release_trains(
    cases: Golden, kind: str, trainable: OfficialChatGlmForCausalLM
) -> None:
    names = [name for name, weight in trainable.named_parameters() if weight.requires_grad]
    assert names == cases.values[f"{kind}.trainable"]["names"]


def test_twenty_training_steps(cases: Golden, kind: str, trainable: OfficialChatGlmForCausalLM) -> None:
    case = cases.case(f"{kind}.train20")
    settings = cases.values[f"{kind}.train20"]["optimizer"]
    assert isinstance(settings, dict)
    weights = list(_prefix(trainable).parameters())
    optimizer = torch.optim.AdamW(weights, lr=settings["lr"], eps=settings["eps"], weight_decay=0.0)
    losses, norms = [], []
    for step in range(20):
        loss = trainable(**cases.inputs(f"train_batch.{step % 2}")).loss
        loss.backward()
        norms.append(nn.utils.get_total_norm([weight.grad for weight in weights]))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    close(torch.stack(losses), case["losses"], TRAINING)
    torch.testing.assert_close(torch.stack(norms), case["grad_norms"], rtol=2e-5, atol=2e-5)
    close(_prefix(trainable).embedding.weight.detach(), case["final.embedding.weight"], PREFIX)
    trainable.eval()
    with torch.no_grad():
        probe = trainable(cases.inputs(f"{kind}.plain_b")["input_ids"]).logits[:, -4:]
    close(probe, case["final_probe_logits_last4"], LOGITS)


def test_a_new_prefix_has_the_shape_of_the_official_file(
    cases: Golden, kind: str, base: OfficialChatGlmForCausalLM
) -> None:
    settings = PrefixSettings(pre_seq_len=8, prefix_projection=kind == "projection")
    official = load_prefix(cases.folder / f"ptuning_{kind}", base)
    shapes = [
        {name: weight.shape for name, weight in encoder.named_parameters()}
        for encoder in (official, build_prefix_encoder(base, settings))
    ]
    assert shapes[0] == shapes[1]


def test_files_go_out_and_come_back(
    cases: Golden, kind: str, base: OfficialChatGlmForCausalLM, tmp_path: Path
) -> None:
    encoder = load_prefix(cases.folder / f"ptuning_{kind}", base)
    config = read_config(cases.folder / "checkpoint_bin")
    file = export_official_prefix(encoder, tmp_path / "official", config=config)
    written = torch.load(file, weights_only=True)
    released = torch.load(cases.folder / f"ptuning_{kind}" / "pytorch_model.bin", weights_only=True)
    assert written.keys() == released.keys()
    assert all(torch.equal(written[name], released[name]) for name in released)
    save_prefix(encoder, tmp_path / "ours")
    for place in ("official", "ours"):
        again = load_prefix(tmp_path / place, base).state_dict()
        assert all(torch.equal(again[name], weight) for name, weight in encoder.state_dict().items())


def test_a_prefix_of_another_depth_is_refused_with_both_shapes(oracles: Path, kind: str) -> None:
    other = load_official(oracles / "v1_l28" / "checkpoint_safetensors", device="cpu")
    with pytest.raises(CheckpointError, match=r"made for 2 layers x 4 .* has 28 layers x 2 key/value heads"):
        load_prefix(oracles / "v1" / f"ptuning_{kind}", other)


@torch.no_grad()
def test_a_written_prefix_holds_the_unrotated_keys_of_its_text(base: OfficialChatGlmForCausalLM) -> None:
    ids = torch.tensor([[7, 30, 31, 9, 161, 164]])
    rows = text_rows(base, ids)
    heads, width = base.config.num_attention_heads, base.config.head_dim
    parts = rows.view(6, base.config.num_hidden_layers, 2, heads, width)
    cache = base(ids, use_cache=True).cache
    cos, sin = base.transformer.rotary_emb(rows, token_positions(ids, base.config))
    assert len(cache.layers) == base.config.num_hidden_layers
    for layer, cached in enumerate(cache.layers):
        keys = rotate(parts[None, :, layer, 0], cos, sin)
        close(keys.transpose(1, 2), cached.keys, 1e-5)
        close(parts[None, :, layer, 1].transpose(1, 2), cached.values, 1e-6)


@torch.no_grad()
def test_a_prefix_made_of_a_text(base: OfficialChatGlmForCausalLM) -> None:
    class Tokenizer:
        def __call__(self, text: str, **_: object) -> dict[str, Tensor]:
            assert text == "say it"
            return {"input_ids": torch.tensor([[7, 30, 31, 161, 164]])}

    rows = text_rows(base, torch.tensor([[7, 30, 31, 161, 164]]))
    for length, expected in ((3, rows[:3]), (7, rows[[0, 1, 2, 3, 4, 0, 1]])):
        settings = PrefixSettings(pre_seq_len=length, init="text", init_text="say it")
        encoder = build_prefix_encoder(base, settings, Tokenizer())  # pyright: ignore[reportArgumentType]
        close(encoder.embedding.weight, expected, 0.0)
