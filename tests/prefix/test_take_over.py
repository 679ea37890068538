"""A new prefix takes over a saved one: as long, longer, shorter, projected and plain."""

from __future__ import annotations

import pytest
import torch

from glmtune.errors import ConfigError
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from glmtune.prefix.init import build_prefix_encoder, take_over, text_rows
from glmtune.prefix.settings import PrefixSettings
from tests.prefix.conftest import make_base, make_prefix
from tests.prefix.test_init import TEXT, Tokenizer

MODEL = make_base()


def taken(saved: PrefixEncoder, **values: object) -> PrefixEncoder:
    settings = PrefixSettings(**values)  # type: ignore[arg-type]
    torch.manual_seed(9)
    encoder = build_prefix_encoder(MODEL, settings, Tokenizer())  # type: ignore[arg-type]
    take_over(saved, encoder, settings, "runs/old")
    return encoder


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("length", [3, 5, 8])
def test_positions_are_kept_in_order(length: int, projection: bool) -> None:
    saved = make_prefix(MODEL, length=5, projection=projection)
    encoder = taken(saved, pre_seq_len=length, prefix_projection=projection)
    kept = min(length, 5)
    assert encoder().shape[2] == length
    torch.testing.assert_close(encoder()[:, :, :kept], saved()[:, :, :kept], rtol=1e-5, atol=1e-6)
    if length > 5:
        torch.manual_seed(9)
        fresh = build_prefix_encoder(MODEL, PrefixSettings(pre_seq_len=length, prefix_projection=projection))
        assert torch.equal(encoder.embedding.weight[5:], fresh.embedding.weight[: length - 5])


def test_as_long_is_the_very_same() -> None:
    for projection in (False, True):
        saved = make_prefix(MODEL, length=5, projection=projection)
        encoder = taken(saved, pre_seq_len=5, prefix_projection=projection)
        assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), encoder.parameters(), strict=True))


@pytest.mark.parametrize("length", [3, 5, 7])
def test_a_projected_prefix_becomes_plain(length: int) -> None:
    saved = make_prefix(MODEL, length=5, projection=True)
    encoder = taken(saved, pre_seq_len=length)
    assert not encoder.prefix_projection
    assert torch.equal(encoder()[:, :, : min(length, 5)], saved()[:, :, :length])


def test_fresh_positions_are_of_init() -> None:
    saved = make_prefix(MODEL, length=2)
    assert not taken(saved, pre_seq_len=6, init="zero")()[:, :, 2:].any()
    rows = taken(saved, pre_seq_len=5, init="text", init_text="Be brief.").rows()[2:]
    assert torch.equal(rows, text_rows(MODEL, torch.tensor([TEXT]))[:3]), "from the text's first token on"


@pytest.mark.parametrize(
    ("saved", "values", "said"),
    [
        (
            (5, False),
            {"pre_seq_len": 5, "prefix_projection": True},
            r"`prefix.prefix_projection` is true.*=false",
        ),
        ((5, False), {"pre_seq_len": 5, "init": "zero"}, r"`prefix.init` is `zero`.*nothing to initialise"),
        ((5, True), {"pre_seq_len": 7, "init": "zero", "prefix_projection": True}, r"makes no zeros"),
    ],
)
def test_what_cannot_be_had(saved: tuple[int, bool], values: dict[str, object], said: str) -> None:
    length, projection = saved
    with pytest.raises(ConfigError, match=said) as caught:
        taken(make_prefix(MODEL, length=length, projection=projection), **values)
    assert "prefix." in str(caught.value)


def test_a_projection_of_other_widths() -> None:
    saved = PrefixEncoder(prefix_shape(MODEL.config), pre_seq_len=5, hidden_size=12)
    with pytest.raises(ConfigError, match=r"other widths.*12; here.*32.*prefix_projection=false"):
        taken(saved, pre_seq_len=5, prefix_projection=True)
    assert torch.equal(taken(saved, pre_seq_len=5)(), saved())
