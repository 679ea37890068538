"""Models of placeholders: shapes without memory, filled tensor by tensor with what is stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glmtune.errors import CheckpointError
from glmtune.models.load import is_quantized, load_official
from glmtune.models.placeholders import (
    is_placeholder,
    load_placeholders,
    pending_weights,
    set_pending_weights,
)

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "models"


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "glm4"])
def test_filled_it_is_the_model_loaded_whole(name: str) -> None:
    expected = load_official(GOLDEN / name, dtype="float32", device="cpu")
    model = load_placeholders(GOLDEN / name, dtype="float32")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(is_placeholder(weight) and bool(weight.isnan().all()) for weight in parameters.values())
    assert sum(weight.untyped_storage().nbytes() for weight in model.parameters()) == 4 * len(
        list(model.parameters())
    )
    pending = pending_weights(model)
    assert pending is not None
    assert pending.fingerprint() == expected.fingerprint()

    @contextmanager
    def destination(names: Sequence[str]) -> Iterator[list[Tensor]]:
        whole = [torch.empty(parameters[name].shape) for name in names]
        yield whole
        for name, tensor in zip(names, whole, strict=True):
            parameters[name].data = tensor

    pending.read(destination)
    set_pending_weights(model, None)
    assert pending_weights(model) is None
    for key, weight in expected.named_parameters(remove_duplicate=False):
        assert torch.equal(parameters[key], weight), key
    ids = torch.arange(5, 17)[None]
    if name == "chatglm":
        ids[0, -3:-1] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=0)


def test_a_process_that_does_not_read_gets_nothing_written() -> None:
    model = load_placeholders(GOLDEN / "glm4", dtype="float32")
    pending, asked = pending_weights(model), []
    assert pending is not None

    @contextmanager
    def closed(names: Sequence[str]) -> Iterator[None]:
        asked.extend(names)
        yield None

    pending.read(closed)
    assert set(asked) == {name for name, _ in model.named_parameters()}


def test_what_does_not_fit_is_named_before_anything_is_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "glm4", tmp_path / "base"))
    file = folder / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    del weights["transformer.output_layer.weight"]
    torch.save(weights, file)
    with pytest.raises(CheckpointError, match=r"1 missing: transformer\.output_layer\.weight"):
        load_placeholders(folder, dtype="float32")


def test_codes_are_told_by_the_configuration(tmp_path: Path) -> None:
    assert not is_quantized(GOLDEN / "chatglm2")
    folder = Path(shutil.copytree(GOLDEN / "chatglm2", tmp_path / "base"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_bit": 4}))
    assert is_quantized(folder)
