"""Negative log-likelihoods of a text: the model's own loss, window by window."""

from __future__ import annotations

import pytest
import torch

from evaluation.backends.glm import GlmBackend
from evaluation.backends.prompt_encoder import PromptEncoder
from glmtune.errors import ConfigError, DataError
from glmtune.inference.perplexity import token_losses
from glmtune.loading import load_model, load_tokenizer

TEXT = "这条裙子颜色很白，面料柔软，穿着舒服。小明有3个苹果，又买了5个，一共有8个。"


@pytest.fixture(scope="module")
def loaded(tiny_base):
    return load_model(tiny_base), load_tokenizer(tiny_base)


def test_is_the_loss_of_the_model_itself(loaded):
    model, tokenizer = loaded
    encode = PromptEncoder(tokenizer).plain_ids
    marks, ids = encode(TEXT)
    (losses,) = token_losses(model, encode, TEXT, window_tokens=100)
    input_ids = torch.tensor([[*marks, *ids]])
    labels = input_ids.clone()
    labels[:, : len(marks)] = -100
    with torch.no_grad():
        expected = model(input_ids=input_ids, labels=labels).loss
    assert len(losses) == len(ids)
    assert float(losses.mean()) == pytest.approx(float(expected), rel=1e-5)


def test_every_token_is_predicted_once_whatever_the_window(loaded):
    model, tokenizer = loaded
    encode = PromptEncoder(tokenizer).plain_ids
    num_tokens = len(encode(TEXT)[1])
    windows = token_losses(model, encode, TEXT, window_tokens=7)
    assert [len(each) for each in windows] == [7] * (num_tokens // 7) + (
        [num_tokens % 7] if num_tokens % 7 else []
    )
    whole = token_losses(model, encode, TEXT, window_tokens=100)[0]
    assert torch.allclose(windows[0], whole[:7], atol=1e-5)


def test_chatglm_6b_reads_it_left_to_right(oracles):
    """A prefix LM sees its context in both directions; the text must not be part of it."""
    from glmtune.models.load import load_official

    folder = oracles / "v1" / "checkpoint_safetensors"
    model = load_official(folder, dtype="float32")
    ids = list(range(5, 25))
    marks = [model.config.gmask_token_id, model.config.bos_token_id]
    one = token_losses(model, lambda text: (marks, ids), "", window_tokens=30)[0]
    other = token_losses(model, lambda text: (marks, [*ids[:-1], 40]), "", window_tokens=30)[0]
    assert torch.equal(one[:-1], other[:-1])


def test_what_does_not_fit_is_refused(loaded):
    model, tokenizer = loaded
    encode = PromptEncoder(tokenizer).plain_ids
    with pytest.raises(
        ConfigError, match=r"A window of 256 tokens with the 2 .* context of 256. Use at most 254"
    ):
        token_losses(model, encode, TEXT, window_tokens=256)
    with pytest.raises(DataError, match="is empty"):
        token_losses(model, encode, "", window_tokens=100)


def test_the_backend_adds_up(loaded):
    model, tokenizer = loaded
    backend = GlmBackend(model, tokenizer)
    windows = token_losses(model, PromptEncoder(tokenizer).plain_ids, TEXT, window_tokens=20)
    found = backend.text_losses(TEXT, 20)
    assert [each.num_tokens for each in found] == [len(each) for each in windows]
    assert [each.nats for each in found] == pytest.approx([float(each.sum()) for each in windows], rel=1e-5)
    stored = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    assert backend.weight_bytes == stored
