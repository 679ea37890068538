"""The prefix against a direct computation: batches, padding, caches, packing, beams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GlmForCausalLM, StaticCache

from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.encoder import PrefixEncoder
from tests.prefix.conftest import make_base, make_opened, make_prefix, random_ids
from tests.prefix.direct import direct_logits

TOLERANCE = 2e-5


@pytest.fixture(params=["sdpa", "eager", "sdpa, gated", "eager, gated"])
def tuned(request: pytest.FixtureRequest) -> GlmForCausalLM:
    attention, _, gated = request.param.partition(", ")
    model = make_base(attention)
    attach_prefix(model, (make_opened if gated else make_prefix)(model, projection=True))
    return model


def tuned_logits(model: GlmForCausalLM, ids: Tensor) -> Tensor:
    """Compute directly what a model gives with its prefix."""
    encoder = model.model.prefix_encoder
    assert isinstance(encoder, PrefixEncoder)
    gates = None if encoder.gate is None else encoder.gate.weight.detach().tanh()
    return direct_logits(model, ids, encoder().detach(), gates)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_the_direct_computation_is_right_without_a_prefix() -> None:
    model, ids = make_base(), random_ids(1, 9)
    assert_close(direct_logits(model, ids[0], None), model(ids).logits[0].detach())


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 9])
def test_every_row_of_a_batch(tuned: GlmForCausalLM, length: int) -> None:
    ids = random_ids(3, length)
    logits = tuned(ids).logits
    for row in range(3):
        assert_close(logits[row], tuned_logits(tuned, ids[row]))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(tuned: GlmForCausalLM, side: str) -> None:
    ids = random_ids(3, 9)
    lengths = [9, 4, 1]
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 9 - length if side == "left" else 0 : 9 if side == "left" else length] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = tuned(ids * mask, attention_mask=mask, position_ids=positions).logits
    assert torch.isfinite(logits).all()
    for row in range(3):
        real = mask[row].bool()
        assert_close(logits[row, real], tuned_logits(tuned, ids[row, real]))


@torch.no_grad()
def test_inputs_embeds(tuned: GlmForCausalLM) -> None:
    ids = random_ids(2, 6)
    embeds = tuned.get_input_embeddings()(ids)
    assert_close(tuned(inputs_embeds=embeds).logits, tuned(ids).logits)


@torch.no_grad()
def test_the_decoder_stack_alone_sees_the_prefix(tuned: GlmForCausalLM) -> None:
    ids = random_ids(2, 6)
    hidden = tuned.model(ids).last_hidden_state
    assert_close(tuned.lm_head(hidden), tuned(ids).logits)


@torch.no_grad()
def test_chunked_prefill_into_a_cache(tuned: GlmForCausalLM) -> None:
    ids = random_ids(2, 9)
    cache, parts = None, []
    for start, end in [(0, 4), (4, 7), (7, 8), (8, 9)]:
        output = tuned(ids[:, start:end], cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    assert cache.get_seq_length() == 9  # tokens only
    assert_close(torch.cat(parts, dim=1), tuned(ids).logits)


@torch.no_grad()
def test_static_cache(tuned: GlmForCausalLM) -> None:
    ids = random_ids(2, 9)
    cache, parts = StaticCache(config=tuned.config, max_cache_len=16), []
    for start, end in [(0, 4), (4, 7), (7, 8), (8, 9)]:
        positions = torch.arange(start, end)[None]
        output = tuned(ids[:, start:end], cache=cache, use_cache=True, position_ids=positions)
        parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1), tuned(ids).logits)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_rows_see_the_prefix_and_only_themselves(tuned: GlmForCausalLM, checkpointed: bool) -> None:
    tuned.train()
    if checkpointed:
        tuned.gradient_checkpointing_enable()
    samples = [random_ids(1, length, seed=length)[0] for length in (5, 1, 7)]
    packed = torch.cat(samples)[None]
    positions = torch.cat([torch.arange(len(sample)) for sample in samples])[None]
    logits = tuned(packed, position_ids=positions, use_cache=False).logits[0]
    for piece, sample in zip(logits.split([5, 1, 7]), samples, strict=True):
        assert_close(piece.detach(), tuned_logits(tuned, sample))
    weight = tuned.model.prefix_encoder.trans[2].weight
    (together,) = torch.autograd.grad(logits.square().sum(), weight)
    alone = sum(tuned(sample[None], use_cache=False).logits.square().sum() for sample in samples)
    (apart,) = torch.autograd.grad(alone, weight)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4 * float(apart.abs().max()))


@torch.no_grad()
def test_custom_four_dimensional_mask(tuned: GlmForCausalLM) -> None:
    ids = random_ids(1, 6)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    assert_close(tuned(ids, attention_mask=additive).logits, tuned(ids).logits)
    # A mask that was ignored would pass so far: hidden from the last token, the first one must not move it.
    visible[..., 5, 0] = False
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    hidden, whole = tuned(ids, attention_mask=additive).logits, tuned(ids).logits
    assert_close(hidden[:, :5], whole[:, :5])
    assert (hidden[:, 5] - whole[:, 5]).abs().max() > 100 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generating_a_left_padded_batch_equals_generating_alone(
    tuned: GlmForCausalLM, options: dict[str, object]
) -> None:
    prompts = [random_ids(1, length, seed=length)[0] for length in (7, 3)]
    ids, mask = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 7 - len(prompt) :], mask[row, 7 - len(prompt) :] = prompt, 1
    common = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    batch = tuned.generate(ids, attention_mask=mask, **common)
    for row, prompt in enumerate(prompts):
        alone = tuned.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **common)
        assert batch[row, 7:].tolist() == alone[0, len(prompt) :].tolist()
        if not options:
            sequence = prompt
            for _ in range(6):
                scores = tuned_logits(tuned, sequence)[-1]
                scores[1] = -torch.inf  # min_new_tokens forbids the end
                sequence = torch.cat([sequence, scores.argmax()[None]])
            assert alone[0].tolist() == sequence.tolist()


@torch.no_grad()
def test_beam_search_equals_beam_search_without_a_cache(tuned: GlmForCausalLM) -> None:
    ids = random_ids(2, 5)
    common = {"max_new_tokens": 6, "num_beams": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = tuned.generate(ids, use_cache=True, **common)
    assert torch.equal(cached, tuned.generate(ids, use_cache=False, **common))
