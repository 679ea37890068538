"""The strength of a prefix: log strength on the scores of its columns, in every way attention is computed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glmtune.errors import CheckpointError, ConfigError
from glmtune.loading import load_base, load_model
from glmtune.prefix.attach import attach_prefix, detach_prefix, set_strength, strength_of, without_prefix
from glmtune.prefix.attention import weaken
from glmtune.prefix.checkpoint import describe_prefix, export_official_prefix, load_prefix, save_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from tests.prefix.conftest import make_base, make_prefix, random_ids

IDS = random_ids(2, 9)
PADDED = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])


def reference(
    query: Tensor, key: Tensor, value: Tensor, num_prefix: int, strength: float, scaling: float
) -> Tensor:
    """Attention over a prefix and causal tokens, with the shares of the prefix multiplied before the division."""
    scores = query @ key.transpose(2, 3) * scaling
    num_queries = query.shape[2]
    hidden = torch.ones(num_queries, num_queries, dtype=torch.bool).triu(1)
    scores[..., num_prefix:] = scores[..., num_prefix:].masked_fill(hidden, -math.inf)
    shares = scores.exp()
    shares[..., :num_prefix] *= strength
    return shares / shares.sum(-1, keepdim=True) @ value


@pytest.mark.parametrize("strength", [1e-3, 0.3, 1.0, 2.5])
def test_added_channels_are_the_reference(strength: float) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 5 + 6, 8), torch.randn(2, 4, 5 + 6, 8)
    expected = reference(query, key, value, 5, strength, 0.4)
    wider = weaken(query, key, value, num_prefix=5, strength=strength, scaling=0.4)
    mask = torch.cat([torch.ones(6, 5), torch.ones(6, 6).tril()], dim=1).bool()
    found = torch.nn.functional.scaled_dot_product_attention(*wider, attn_mask=mask, scale=0.4)[..., :8]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_loses_nothing_of_the_strength() -> None:
    ones = torch.ones(1, 1, 1, 64, dtype=torch.bfloat16)
    query, key, _ = weaken(ones * 0, ones.expand(1, 1, 2, 64), ones.expand(1, 1, 2, 64), num_prefix=1,
                           strength=0.37, scaling=0.125)  # fmt: skip
    scores = (query.float() @ key.float().transpose(2, 3) * 0.125).flatten()
    assert scores[1] == 0
    assert float(scores[0]) == pytest.approx(math.log(0.37), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_ends_are_the_prefix_and_the_base(attention: str, mask: Tensor | None) -> None:
    model = make_base(attention)
    attach_prefix(model, make_prefix(model))
    tuned = model(IDS, attention_mask=mask).logits
    assert torch.equal(model(IDS, attention_mask=mask, prefix_strength=1.0).logits, tuned)
    with without_prefix(model):
        base = model(IDS, attention_mask=mask).logits
    without = model(IDS, attention_mask=mask, prefix_strength=0.0).logits
    torch.testing.assert_close(without, base, rtol=1e-5, atol=1e-5)  # the stock kernel may round otherwise
    nearly = model(IDS, attention_mask=mask, prefix_strength=1 - 1e-6).logits
    kept = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(nearly[kept], tuned[kept], rtol=1e-3, atol=1e-4)
    between = model(IDS, attention_mask=mask, prefix_strength=0.5).logits
    assert not torch.allclose(between[kept], tuned[kept], atol=1e-3)
    assert not torch.allclose(between[kept], base[kept], atol=1e-3)


@torch.no_grad()
def test_both_implementations_agree() -> None:
    found = []
    for attention in ("sdpa", "eager"):
        model = make_base(attention)
        attach_prefix(model, make_prefix(model))
        found.append(model(IDS, prefix_strength=0.4).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_whole_number_counts_the_prefix_so_often() -> None:
    model = make_base()
    encoder = make_prefix(model)
    attach_prefix(model, encoder)
    twice = model(IDS, prefix_strength=2.0).logits
    doubled = PrefixEncoder(encoder.shape, pre_seq_len=2 * encoder.pre_seq_len)
    doubled.embedding.weight.copy_(encoder.embedding.weight.repeat(2, 1))
    attach_prefix(model, doubled)
    torch.testing.assert_close(model(IDS).logits, twice, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_first_generation(oracles: Path) -> None:
    model = load_base(oracles / "v1" / "checkpoint_bin", device="cpu", dtype="float32")
    torch.manual_seed(4)
    encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=3).eval()
    doubled = PrefixEncoder(encoder.shape, pre_seq_len=6).eval()
    doubled.embedding.weight.copy_(encoder.embedding.weight.repeat(2, 1))
    config = model.config
    ids = torch.tensor([[7, 8, 9, 10, config.gmask_token_id, config.bos_token_id, 11, 12]])
    base = model(ids).logits
    attach_prefix(model, encoder)
    assert torch.equal(model(ids, prefix_strength=0.0).logits, base)
    twice = model(ids, prefix_strength=2.0).logits
    attach_prefix(model, doubled)
    torch.testing.assert_close(model(ids).logits, twice, rtol=1e-4, atol=1e-5)


class TestGenerate:
    @pytest.fixture(scope="class")
    def tuned(self, tiny_base):
        model = load_base(tiny_base, device="cpu", dtype="float32")
        torch.manual_seed(3)
        encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=4)
        with torch.no_grad():
            encoder.embedding.weight.mul_(3)
        attach_prefix(model, encoder)
        return model

    def test_cached_steps_are_one_uncached_pass(self, tuned) -> None:
        ids = torch.arange(5, 14)[None]
        kept = {
            "max_new_tokens": 6,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        out = tuned.generate(ids, attention_mask=torch.ones_like(ids), prefix_strength=0.3, **kept)
        with torch.no_grad():
            whole = tuned(out.sequences, prefix_strength=0.3).logits[0, ids.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.cat(out.logits), whole, rtol=1e-4, atol=1e-5)

    def test_chat_and_stream(self, tuned, tiny_tokenizer) -> None:
        asked = {"do_sample": False, "max_new_tokens": 8}
        with without_prefix(tuned):
            base, _ = tuned.chat(tiny_tokenizer, "你好", **asked)
        answers = {s: tuned.chat(tiny_tokenizer, "你好", prefix_strength=s, **asked)[0] for s in (0, 0.5, 1)}
        assert answers[0] == base
        assert answers[1] == tuned.chat(tiny_tokenizer, "你好", **asked)[0] != base
        streamed = list(tuned.stream_chat(tiny_tokenizer, "你好", prefix_strength=0.5, **asked))[-1][0]
        assert streamed == answers[0.5]

    def test_a_cache_keeps_its_strength(self, tuned, tiny_tokenizer) -> None:
        asked = {"do_sample": False, "max_new_tokens": 4, "return_past_key_values": True}
        *_, (_, history, cache) = tuned.stream_chat(tiny_tokenizer, "你好", prefix_strength=0.5, **asked)
        assert cache.prefix_strength == 0.5
        with pytest.raises(ConfigError, match=r"`prefix_strength` is 1.0, but `past_key_values`.*with 0.5"):
            next(
                tuned.stream_chat(
                    tiny_tokenizer, "好", history, past_key_values=cache, prefix_strength=1.0, **asked
                )
            )
        *_, (with_cache, _, _) = tuned.stream_chat(
            tiny_tokenizer, "好", history, past_key_values=cache, **asked
        )
        assert isinstance(with_cache, str)

    @pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf, "half", True])
    def test_what_is_no_strength(self, tuned, tiny_tokenizer, wrong) -> None:
        with pytest.raises(ConfigError, match=r"`prefix_strength` is .*it must be a number from 0"):
            tuned.chat(tiny_tokenizer, "你好", prefix_strength=wrong)

    def test_without_a_prefix(self, tiny_base, tiny_tokenizer) -> None:
        model = load_base(tiny_base, device="cpu")
        with pytest.raises(ConfigError, match=r"`prefix_strength` is 0.5, but no prefix is attached"):
            model.chat(tiny_tokenizer, "你好", prefix_strength=0.5)
        assert model.chat(tiny_tokenizer, "你好", prefix_strength=1, max_new_tokens=2)[0] is not None


class TestStrengthOfAModel:
    """Of every forward that asks for none."""

    @torch.no_grad()
    def test_forwards_that_name_none_have_it(self) -> None:
        model = make_base()
        base = model(IDS).logits
        attach_prefix(model, make_prefix(model).eval(), strength=0.5)
        half = model(IDS).logits
        assert torch.equal(half, model(IDS, prefix_strength=0.5).logits)
        assert not torch.allclose(half, model(IDS, prefix_strength=1.0).logits)
        assert strength_of(model) == 0.5
        with without_prefix(model):
            assert torch.equal(model(IDS).logits, base)
        assert torch.equal(model(IDS).logits, half), "it is there again after the base was asked"
        set_strength(model, 0)
        assert torch.equal(model(IDS).logits, base)

    @torch.no_grad()
    def test_a_file_with_a_strength_counts_from_there(self, tmp_path: Path) -> None:
        model = make_base()
        encoder = make_prefix(model).eval()
        attach_prefix(model, encoder)
        quarter = model(IDS, prefix_strength=0.25).logits
        encoder.strength = 0.5
        save_prefix(encoder, tmp_path)
        loaded = load_prefix(tmp_path, model).eval()
        assert (loaded.strength, describe_prefix(tmp_path).strength) == (0.5, 0.5)
        attach_prefix(model, loaded, strength=0.5)
        assert strength_of(model) == 0.25
        torch.testing.assert_close(model(IDS).logits, quarter, rtol=0, atol=0)
        detach_prefix(model)
        attach_prefix(model, loaded)
        torch.testing.assert_close(model(IDS, prefix_strength=0.5).logits, quarter, rtol=0, atol=0)

    def test_generate_chat_and_stream_obey_it(self, tiny_base: Path, tiny_tokenizer, tmp_path: Path) -> None:
        torch.manual_seed(3)
        plain = load_base(tiny_base, device="cpu", dtype="float32")
        encoder = PrefixEncoder(prefix_shape(plain.config), pre_seq_len=4)
        with torch.no_grad():
            encoder.embedding.weight.mul_(3)
        save_prefix(encoder, tmp_path)
        asked = {"do_sample": False, "max_new_tokens": 8}
        options = {"device": "cpu", "dtype": "float32", "prefix": tmp_path}
        whole = load_model(tiny_base, **options)
        expected = whole.chat(tiny_tokenizer, "你好", prefix_strength=0.3, **asked)[0]
        tuned = load_model(tiny_base, prefix_strength=0.3, **options)
        assert tuned.chat(tiny_tokenizer, "你好", **asked)[0] == expected
        kept = {"return_past_key_values": True, **asked}
        *_, (streamed, _, cache) = tuned.stream_chat(tiny_tokenizer, "你好", **kept)
        assert (streamed, cache.prefix_strength) == (expected, 0.3)
        as_tuned = whole.chat(tiny_tokenizer, "你好", **asked)[0]
        assert tuned.chat(tiny_tokenizer, "你好", prefix_strength=1, **asked)[0] == as_tuned != expected
        ids = torch.arange(5, 14)[None]
        beams = {"num_beams": 2, **asked}
        assert torch.equal(tuned.generate(ids, **beams), whole.generate(ids, prefix_strength=0.3, **beams))

    @pytest.mark.parametrize("value", ["1", "0", "-1", "NaN", "true"])
    def test_a_file_that_says_nonsense_is_refused(self, value: str, tmp_path: Path) -> None:
        model = make_base()
        encoder = make_prefix(model)
        encoder.strength = 0.5
        file = save_prefix(encoder, tmp_path)
        content = file.read_bytes().replace(b'"strength":"0.5"', f'"strength":"{value:<3.3}"'.encode())
        file.write_bytes(content)
        if value == "1":
            assert load_prefix(file, model).strength == 1
        else:
            with pytest.raises(CheckpointError, match=r"strength = .*above 0|could not be read"):
                load_prefix(file, model)

    def test_the_official_file_has_no_place_for_it(self, tmp_path: Path) -> None:
        encoder = make_prefix(make_base())
        encoder.strength = 0.5
        with pytest.raises(
            ConfigError, match=r"strength of the prefix is 0.5.*no place for one.*format=tuned"
        ):
            export_official_prefix(encoder, tmp_path)
        assert list(tmp_path.iterdir()) == []
