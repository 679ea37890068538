"""The 32K releases: all 32,768 positions work, and reading a prompt takes memory linear in its length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glmtune.inference.predict.generate import generate_ids
from glmtune.inference.settings import GenerationSettings
from glmtune.models.chat.stream import PREFILL_CHUNK_TOKENS, ConversationCache, stream_tokens
from glmtune.models.checkpoints.config import native_config
from glmtune.models.later import OfficialGlmForCausalLM
from glmtune.models.releases.families import Family
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

CONTEXT = 32768
VOCABULARY = 4096
FAMILIES = {Family.CHATGLM2_32K: 16, Family.CHATGLM3_32K: 50}


def make_model(family: Family, attention: str = "sdpa") -> OfficialGlmForCausalLM:
    """One layer, 2 heads of 8 channels over 1 key/value head."""
    official = {
        "model_type": "chatglm",
        "num_layers": 1,
        "hidden_size": 16,
        "ffn_hidden_size": 16,
        "kv_channels": 8,
        "num_attention_heads": 2,
        "multi_query_attention": True,
        "multi_query_group_num": 1,
        "padded_vocab_size": VOCABULARY,
        "seq_length": CONTEXT,
        "rope_ratio": FAMILIES[family],
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    config = native_config(official, family)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = OfficialGlmForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if weight.dim() == 1 else 0.0))
    return model


def with_prefix(model: OfficialGlmForCausalLM) -> OfficialGlmForCausalLM:
    torch.manual_seed(1)
    encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=6)
    torch.nn.init.normal_(encoder.embedding.weight)
    attach_prefix(model, encoder.eval())
    return model


def random_ids(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(
    ("family", "prefixed"),
    [(Family.CHATGLM2_32K, False), (Family.CHATGLM3_32K, False), (Family.CHATGLM3_32K, True)],
)
@torch.no_grad()
def test_full_length_with_and_without_cache(family: Family, prefixed: bool) -> None:
    model = make_model(family)
    if prefixed:
        with_prefix(model)
    ids = random_ids(CONTEXT)
    whole = model(ids, use_cache=False, logits_to_keep=2).logits
    cache = model(ids[:, :-2], use_cache=True, logits_to_keep=1).cache
    steps = [model(ids[:, place : place + 1], cache=cache).logits for place in (-2, CONTEXT - 1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == CONTEXT
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("prefixed", [False, True], ids=["bare", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_far_positions_equal_eager_attention(family: Family, prefixed: bool) -> None:
    """At the far end of the context; eager attention writes its scores and its mask out."""
    fused, eager = make_model(family), make_model(family, "eager")
    if prefixed:
        with_prefix(fused)
        with_prefix(eager)
    ids = random_ids(300)
    positions = torch.arange(CONTEXT - 300, CONTEXT)[None]
    expected = eager(ids, position_ids=positions).logits
    torch.testing.assert_close(fused(ids, position_ids=positions).logits, expected, atol=1e-4, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation put out; a view counts as its storage."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def generate_alone(model: OfficialGlmForCausalLM, length: int) -> None:
    model.generate(random_ids(length), max_new_tokens=2, do_sample=False)


def generate_padded(model: OfficialGlmForCausalLM, length: int) -> None:
    settings = GenerationSettings(max_new_tokens=2, max_batch_tokens=4 * CONTEXT)
    prompts = [random_ids(length)[0].tolist(), random_ids(length // 2)[0].tolist()]
    assert len(list(generate_ids(model, prompts, settings, stop_ids=[2], pad_id=0))) == 2


def generate_with_beams(model: OfficialGlmForCausalLM, length: int) -> None:
    settings = GenerationSettings(max_new_tokens=2, num_beams=2, max_batch_tokens=8 * CONTEXT)
    prompts = [random_ids(length)[0].tolist(), random_ids(length // 2)[0].tolist()]
    assert len(list(generate_ids(model, prompts, settings, stop_ids=[2], pad_id=0))) == 2


def stream_on(model: OfficialGlmForCausalLM, length: int) -> None:
    """Half of the text is in the cache, half is new, as in a later turn of a chat."""
    cache, ids = ConversationCache(), random_ids(length)[0].tolist()
    settings = {"cache": cache, "max_new_tokens": 2, "do_sample": False}
    list(stream_tokens(model, ids[: length // 2], **settings))
    list(stream_tokens(model, ids, prefill_chunk_size=PREFILL_CHUNK_TOKENS, **settings))


@pytest.mark.parametrize("prefixed", [False, True], ids=["bare", "prefix"])
@pytest.mark.parametrize("run", [generate_alone, generate_padded, generate_with_beams, stream_on])
def test_memory_of_prefill_grows_linearly(run: Callable[..., None], prefixed: bool) -> None:
    """No logits of the whole prompt (S x vocabulary) and no mask or score of S x S."""
    model = make_model(Family.CHATGLM3_32K)
    if prefixed:
        with_prefix(model)
    largest, scale = [], 2 if run is generate_with_beams else 1  # twice as many rows
    for length in (8192, 16384):
        with LargestTensor() as seen:
            run(model, length)
        assert seen.elements < scale * min(length * VOCABULARY, length * length / 3)
        largest.append(seen.elements)
    assert largest[1] <= 2.1 * largest[0]


def test_padded_prompts_of_beams_read_in_chunks_give_the_same_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_prefix(make_model(Family.CHATGLM2_32K))
    prompts = [random_ids(length)[0].tolist() for length in (70, 33, 5)]
    settings = GenerationSettings(max_new_tokens=8, num_beams=2)
    expected = [next(generate_ids(model, [prompt], settings, stop_ids=[2], pad_id=0)) for prompt in prompts]
    monkeypatch.setattr("glmtune.inference.predict.beams.PREFILL_CHUNK_TOKENS", 16)
    batch = sorted(generate_ids(model, prompts, settings, stop_ids=[2], pad_id=0), key=lambda row: row.index)
    assert [row.token_ids for row in batch] == [row.token_ids for row in expected]
