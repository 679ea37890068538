"""Fingerprints keep their values: prefixes, adapters, manifests and journals of all versions refer to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmtune.loading import load_base
from glmtune.models.checkpoints.config import native_config
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.checkpoints.fingerprint import hash_tensors, weights_fingerprint
from glmtune.models.load import load_official
from glmtune.models.releases.families import Family

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "models"
# Of the first version that had them. float32 in memory, whatever is stored.
KNOWN = {
    "chatglm": ("6c7369c86647a17b193b448e3e6e1e31ff849b30f801cff2ee0e667f2145fb55", "5699ccf24d54838b"),
    "chatglm2": ("83161dd904172e7f1685fe01e18f0f574def18f9e231089c8e840a60915af9fa", "eb09933c9970e01c"),
    "glm4": ("2fe10d89fddbcbb55b477e27908a33bac9a12b66c573da465fd06ad1abe876c9", "fbb657013a14f5af"),
    "per-head": ("3f766e3e7191b24ab6682354fbc63e665ecec1db850cf126032ab778739fa78d", "e73a12bb52e3f86d"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_values(name: str) -> None:
    model = load_official(GOLDEN / name, dtype="float32", device="cpu")
    assert (model.fingerprint(), hash_tensors(model.state_dict())) == KNOWN[name]
    assert hash_tensors(model.bfloat16().state_dict()) != KNOWN[name][1]
    assert model.fingerprint() == KNOWN[name][0]


def test_known_values_of_codes() -> None:
    model = load_base(GOLDEN / "chatglm2", device="cpu", quantization="int8")
    assert model.fingerprint() == "2e61b0c66c3d203b014c39f0fd93bd3a78ff77294e083ef2d6364c52d629d79f"
    assert model.is_base(KNOWN["chatglm2"][0])


def test_weights_need_not_be_in_a_model() -> None:
    model = load_official(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    config = native_config(read_config(GOLDEN / "chatglm2"), Family.CHATGLM2)
    assert weights_fingerprint(config, dict(model.named_parameters())) == KNOWN["chatglm2"][0]
