"""The project's own golden models: what an independent forward pass says, wherever the tests run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmtune.models.checkpoints.writing import official_tensors
from glmtune.models.load import load_official

GOLDEN = Path(__file__).resolve().parent / "models"
FAMILIES = {
    "chatglm2": "chatglm2",
    "chatglm2-32k": "chatglm2-32k",
    "chatglm3": "chatglm3",
    "glm4": "glm4",
    "per-head": "chatglm2",
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_logits_loss_and_gradients(name: str, attention: str) -> None:
    model = load_official(GOLDEN / name, dtype=torch.float32, device="cpu", attn_implementation=attention)
    assert model.family == FAMILIES[name]
    expected = load_file(GOLDEN / name / "expected.safetensors")
    ids = expected["input_ids"][None]
    labels = ids.clone()
    labels[:, :6] = -100
    output = model(ids, labels=labels)
    far = model(ids, position_ids=expected["far_position_ids"][None])
    for logits, key in ((output.logits, "logits"), (far.logits, "far_logits")):
        torch.testing.assert_close(logits[0].double(), expected[key], atol=1e-5, rtol=0)
    assert output.loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    output.loss.backward()
    gradients = {
        key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None
    }
    official = official_tensors(gradients, model.config)
    for key, gradient in expected.items():
        if key.startswith("gradient."):
            found = official[key.removeprefix("gradient.")].double()
            torch.testing.assert_close(found, gradient, atol=1e-5 * gradient.abs().max().item(), rtol=0)


@torch.no_grad()
def test_left_padding_changes_nothing() -> None:
    model = load_official(GOLDEN / "chatglm2", dtype=torch.float32, device="cpu")
    expected = load_file(GOLDEN / "chatglm2" / "expected.safetensors")
    ids = torch.nn.functional.pad(expected["input_ids"][None], (3, 0), value=0)
    mask = (torch.arange(15)[None] >= 3).long()
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(logits[0, 3:].double(), expected["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["chatglm", "chatglm-1d", "chatglm-march"])
def test_the_first_generation(name: str, attention: str) -> None:
    model = load_official(GOLDEN / name, dtype=torch.float32, device="cpu", attn_implementation=attention)
    assert model.family == "chatglm"
    expected = load_file(GOLDEN / name / "expected.safetensors")
    for row in ("gmask", "inside"):
        logits = model(expected[f"{row}.input_ids"][None]).logits
        torch.testing.assert_close(logits[0].double(), expected[f"{row}.logits"], atol=1e-5, rtol=0)
    ids = expected["gmask.input_ids"][None]
    labels = ids.clone()
    labels[:, : ids[0].tolist().index(model.config.bos_token_id) + 1] = -100
    loss = model(ids, labels=labels).loss
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {key.removeprefix("gradient."): value for key, value in expected.items() if "gradient" in key}
    assert len(gradients) == 3
    for key, gradient in gradients.items():
        found = parameters[key].grad
        assert found is not None
        tolerance = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(found.double(), gradient, atol=tolerance, rtol=0)
