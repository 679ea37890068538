"""One query over shared keys and values: the numbers of transformers' attention, and when that runs instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from glmtune.loading import load_base
from glmtune.models.architectures import grouped_attention
from glmtune.models.architectures.grouped_attention import grouped_sdpa

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "models"


class _Layer(nn.Module):
    num_key_value_groups = 4
    is_causal = True


def states(queries: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(3, 8, queries, 16), torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16)


@pytest.fixture
def stock_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def counted(module: nn.Module, query: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append(query.shape[2])
        return sdpa_attention_forward(module, query, *rest, **kwargs)

    monkeypatch.setattr(grouped_attention, "sdpa_attention_forward", counted)
    return calls


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_query_has_the_numbers_of_the_stock_attention(
    scaling: float | None, stock_calls: list[int]
) -> None:
    given = states(1)
    found, weights = grouped_sdpa(_Layer(), *given, None, scaling=scaling)
    expected, _ = sdpa_attention_forward(_Layer(), *given, None, scaling=scaling)
    assert weights is None
    assert stock_calls == []
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [2, 31, 32, 33, 100])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_a_prompt_has_the_numbers_of_the_stock_attention(
    tokens: int, scaling: float | None, stock_calls: list[int]
) -> None:
    torch.manual_seed(5)
    given = torch.randn(3, 8, tokens, 16), torch.randn(3, 2, tokens, 16), torch.randn(3, 2, tokens, 16)
    with torch.no_grad():
        found, _ = grouped_sdpa(_Layer(), *given, None, scaling=scaling)
    expected, _ = sdpa_attention_forward(_Layer(), *given, None, scaling=scaling)
    assert stock_calls == []
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_prompt_is_as_near_to_exact_numbers_as_with_the_stock_attention() -> None:
    torch.manual_seed(6)
    shape = (1, 2, 70, 16)
    query, key, value = torch.randn(1, 8, 70, 16).bfloat16(), *torch.randn(2, *shape).bfloat16()
    exact, _ = sdpa_attention_forward(_Layer(), query.double(), key.double(), value.double(), None)
    stock, _ = sdpa_attention_forward(_Layer(), query, key, value, None)
    with torch.no_grad():
        found, _ = grouped_sdpa(_Layer(), query, key, value, None)
    assert found.dtype == torch.bfloat16
    assert (found - exact).square().mean() <= 2 * (stock - exact).square().mean()


def test_masks_graphs_and_later_tokens_are_left_to_the_stock_attention(stock_calls: list[int]) -> None:
    mask = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    mask[0, :, :, :4] = False
    for given, visible in ((states(1), mask), (states(9), None), (states(4), torch.ones(3, 1, 4, 9).bool())):
        found, _ = grouped_sdpa(_Layer(), *given, visible)
        expected, _ = sdpa_attention_forward(_Layer(), *given, visible)
        assert torch.equal(found, expected)
    assert stock_calls == [1, 9, 4]


def test_a_model_decodes_with_it(stock_calls: list[int]) -> None:
    model = load_base(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        stock_calls.clear()
        cache = model(input_ids=ids[:, :-1], use_cache=True).cache
        stepped = model(input_ids=ids[:, -1:], cache=cache, use_cache=True).logits[:, -1]
    assert stock_calls == []  # neither the prompt nor the step
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-4)


def test_models_of_other_kinds_keep_their_attention(stock_calls: list[int]) -> None:
    load_base(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    AttentionInterface()["sdpa"](_Layer(), *states(1), None)
    assert stock_calls == [1]
