"""`model.generate`, `chat` and `stream_chat` with a switch: each row as the base, or as the tuned model, alone."""

from __future__ import annotations

import copy

import pytest
import torch

from glmtune.adapter import load_adapter
from glmtune.errors import ConfigError
from glmtune.loading import load_model, load_tokenizer
from glmtune.models.chat.stream import ConversationCache
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import load_prefix
from glmtune.switch.model import decide_prompts, switch_of
from tests.inference.engine.cases import plain_generate, plain_logits, shared_prompts
from tests.inference.engine.requests import load
from tests.switch.cases import dividing_switch, write_tuned

COUNT = 5
GENERATIONS = ["chatglm", "chatglm-march", "chatglm2", "glm4"]


def tuned_model(base, folder, kind):
    model = copy.deepcopy(base)
    if kind == "lora":
        return load_adapter(folder, model)
    attach_prefix(model, load_prefix(folder, model))
    return model


def padded(prompts, pad=0):
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def batch_generate(model, prompts, **options):
    made = model.generate(
        **padded(prompts), max_new_tokens=COUNT, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return made[:, -COUNT:].tolist()


@pytest.mark.parametrize("kind", ["prefix", "lora"])
@pytest.mark.parametrize("name", GENERATIONS)
def test_rows_of_one_batch_are_each_as_alone(name, kind, tmp_path):
    base = load(name)
    prompts = shared_prompts(base.config)
    switch = dividing_switch(base, prompts)
    model = tuned_model(base, write_tuned(base, tmp_path, kind, switch), kind)
    decided = decide_prompts(model, switch, [torch.tensor(p) for p in prompts]).tolist()
    assert 3 <= sum(decided) <= len(prompts) - 3
    bare, tuned = ([plain_generate(each, p, (), COUNT) for p in prompts] for each in (base, model))
    expected = [tuned[i] if on else bare[i] for i, on in enumerate(decided)]
    assert batch_generate(model, prompts) == expected
    assert [batch_generate(model, [p])[0] for p in prompts] == expected
    assert batch_generate(model, prompts, use_switch=False) == tuned
    beams = batch_generate(model, prompts, num_beams=2)
    assert [batch_generate(model, [p], num_beams=2)[0] for p in prompts] == beams
    # Tiny models often answer alike all the same: their logits do not.
    first = model.generate(
        **padded(prompts), max_new_tokens=1, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    ).logits[0]
    for row, prompt in enumerate(prompts):
        same, other = (
            plain_logits(each, prompt) for each in ((model, base) if decided[row] else (base, model))
        )
        torch.testing.assert_close(first[row], same, atol=1e-4, rtol=1e-4)
        assert (first[row] - other).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["prefix", "lora"])
def test_a_streamed_conversation_is_decided_at_every_turn(kind, tmp_path, monkeypatch):
    """A cache of earlier turns is gone on with under the same decision only."""
    tokenizer = load_tokenizer("glm-tiny")
    base = load_model("glm-tiny", dtype="float32", device="cpu")
    ids = [tokenizer.build_chat_input(text).input_ids[0].tolist() for text in ("你好", "1+1=?", "红色的裙子")]
    switch = dividing_switch(base, [*ids, *[[*each, 70, 71] for each in ids]])
    options = {kind if kind == "prefix" else "adapter": write_tuned(base, tmp_path, kind, switch)}
    model = load_model("glm-tiny", dtype="float32", device="cpu", **options)
    settings = {"do_sample": False, "max_new_tokens": 4}
    for decision in (True, False):
        bias = 1e6 if decision else -1e6
        monkeypatch.setattr(
            switch_of(model).__class__, "decide", lambda self, h, b=bias: (h[:, 0] * 0 + b) > 0
        )
        alone = load_model("glm-tiny", dtype="float32", device="cpu", **options) if decision else base
        alone.use_switch = False
        expected = alone.chat(tokenizer, "你好", **settings)
        assert model.chat(tokenizer, "你好", **settings) == expected
        *_, (response, history, cache) = model.stream_chat(
            tokenizer, "你好", return_past_key_values=True, **settings
        )
        assert (response, history) == expected
        assert cache.is_tuned is decision
        # The next question is decided the other way: nothing of the cache is of use, its tokens are.
        other = base if decision else load_model("glm-tiny", dtype="float32", device="cpu", **options)
        other.use_switch = False
        monkeypatch.setattr(
            switch_of(model).__class__, "decide", lambda self, h, b=-bias: (h[:, 0] * 0 + b) > 0
        )
        *_, (response, _, turned) = model.stream_chat(
            tokenizer, "1+1=?", history, past_key_values=cache, return_past_key_values=True, **settings
        )
        assert turned.is_tuned is not decision
        assert response == _answered(other, tokenizer, cache, history, settings)


def _answered(model, tokenizer, cache, history, settings):
    """Answer the second question, everything read by one model without a switch."""
    fresh = ConversationCache()
    fresh.token_ids = list(cache.token_ids)
    *_, (response, *_rest) = model.stream_chat(
        tokenizer, "1+1=?", history, past_key_values=fresh, return_past_key_values=True, **settings
    )
    return response


def test_a_merged_adapter_cannot_be_switched_off(tmp_path):
    base = load("chatglm2")
    prompts = shared_prompts(base.config)
    switch = dividing_switch(base, prompts)
    model = tuned_model(base, write_tuned(base, tmp_path, "lora", switch), "lora")
    merged = model.merge_and_unload()
    with pytest.raises(ConfigError, match="merged into the weights"):
        batch_generate(merged, prompts)
    merged.use_switch = False
    assert batch_generate(merged, prompts[:1])
    with pytest.raises(ConfigError, match="`use_switch` is True, but nothing with a switch"):
        batch_generate(base, prompts, use_switch=True)
