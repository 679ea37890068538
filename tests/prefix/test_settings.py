"""Rules of the prefix settings."""

from __future__ import annotations

import subprocess
import sys

import pytest

from glmtune.errors import ConfigError
from glmtune.prefix.settings import PrefixSettings
from glmtune.settings import build_settings


def test_defaults_are_the_official_ones() -> None:
    settings = PrefixSettings()
    assert (settings.pre_seq_len, settings.prefix_projection, settings.init) == (128, False, "random")
    assert settings.dropout == 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pre_seq_len": 0}, r"`prefix.pre_seq_len` is 0.*at least 1"),
        ({"init": "zeros"}, r"`prefix.init` is `zeros`.*Did you mean `zero`"),
        ({"dropout": 1.0}, r"`prefix.dropout` is 1.0.*below 1.*use 0"),
        ({"dropout": -0.1}, r"`prefix.dropout` is -0.1"),
        ({"dropout": float("nan")}, r"`prefix.dropout` is nan"),
        ({"init": "text"}, r"`prefix.init` is `text`.*`prefix.init_text` is None.*init=random"),
        ({"init": "text", "init_text": "  "}, r"`prefix.init_text` is '  '"),
        ({"init_text": "Be brief."}, r"`prefix.init_text` is 'Be brief.'.*`random`.*init=text"),
        (
            {"init": "text", "init_text": "x", "prefix_projection": True},
            r"projection.*prefix_projection=false",
        ),
        (
            {"init": "zero", "gate": True},
            r"`zero` and `prefix.gate` is true.*nothing would ever.*init=random",
        ),
        ({"pre_seqlen": 3}, r"`pre_seqlen` is no setting. Did you mean `pre_seq_len`"),
        ({"pre_seq_len": "many"}, r"`pre_seq_len` is 'many'"),
    ],
)
def test_wrong_values_are_explained(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_settings(PrefixSettings, values)


def test_settings_need_no_torch() -> None:
    code = "import sys, glmtune.prefix.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
