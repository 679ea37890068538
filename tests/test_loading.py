"""The public loaders, on the oracle checkpoints and tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import glmtune
from glmtune.errors import CheckpointError, ConfigError, ShapeError
from glmtune.loading import load_model, load_tokenizer
from glmtune.models.releases.families import Family
from glmtune.prefix.attach import prefix_of
from glmtune.prefix.checkpoint import PrefixMeta, load_prefix, save_prefix
from glmtune.prefix.encoder import PrefixEncoder, PrefixShape

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def source(oracles: Path) -> Path:
    return oracles / "v2" / "checkpoint_bin"


@pytest.fixture
def official_prefix(oracles: Path) -> Path:
    return oracles / "v2" / "ptuning_projection"


def test_the_public_names_are_these_functions() -> None:
    assert glmtune.load_model is load_model
    assert glmtune.load_tokenizer is load_tokenizer
    assert glmtune.PrefixEncoder is PrefixEncoder


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_dtype_is_a_type_or_a_name(source: Path, dtype: object, expected: torch.dtype) -> None:
    model = load_model(source, dtype=dtype, device="cpu")  # pyright: ignore[reportArgumentType]
    assert model.lm_head.weight.dtype == expected
    assert not model.training
    assert prefix_of(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_given_as_folder_file_or_encoder(
    source: Path, official_prefix: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = load_model(source, dtype=dtype, prefix=official_prefix)
    encoder = prefix_of(model)
    assert isinstance(encoder, PrefixEncoder)
    assert encoder.embedding.weight.dtype == torch.float32
    assert not encoder.training
    expected = model(IDS).logits
    assert not torch.allclose(expected, load_model(source, dtype=dtype)(IDS).logits)
    meta = PrefixMeta(base_fingerprint=model.fingerprint())
    file = save_prefix(encoder, tmp_path / "run" / "checkpoint-3", meta=meta)
    for prefix in (file, str(tmp_path / "run"), load_prefix(file, model)):
        assert torch.equal(load_model(source, dtype=dtype, prefix=prefix)(IDS).logits, expected)


def test_a_prefix_knows_its_base_by_its_weights(oracles: Path, source: Path, tmp_path: Path) -> None:
    model = load_model(source, dtype="bfloat16", prefix=oracles / "v2" / "ptuning_embedding")
    encoder = prefix_of(model)
    assert encoder is not None
    save_prefix(encoder, tmp_path, meta=PrefixMeta(model.fingerprint(), "v2"))
    load_model(source, dtype="float32", prefix=tmp_path)  # the same weights in another type
    shutil.copytree(source, tmp_path / "other")
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    weights["transformer.output_layer.weight"] *= -1
    torch.save(weights, tmp_path / "other" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"trained on another base: `v2`.*other` has.*check_base=False"):
        load_model(tmp_path / "other", prefix=tmp_path)
    load_model(tmp_path / "other", prefix=tmp_path, check_base=False)


def test_wrong_prefixes_are_refused(oracles: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit.*\(96 numbers.*2 layers x 2 .*\(128 numbers"):
        load_model(source, prefix=oracles / "glm3" / "ptuning_embedding")
    with pytest.raises(CheckpointError, match=r"No prefix at"):
        load_model(source, prefix=source.parent / "nothing")
    with pytest.raises(CheckpointError, match=r"holds no prefix encoder"):
        load_model(source, prefix=source)  # a whole model
    with pytest.raises(ShapeError, match="3 layers"):
        load_model(source, prefix=PrefixEncoder(PrefixShape(3, 2, 16), pre_seq_len=2))


def test_an_unknown_quantization_is_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"`quantization` is `int5`.* Valid: .*int8, int4"):
        load_model(source, quantization="int5")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_where_there_is_none(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"`cuda`.*0 CUDA devices.*cpu"):
        load_model(source, device="cuda")


def test_unknown_names_are_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"chatglm2-6c.*Did you mean `chatglm2-6b`"):
        load_model("chatglm2-6c")
    with pytest.raises(ConfigError, match=r"float8.*float32"):
        load_model(source, dtype="float8")
    with pytest.raises(ConfigError, match=r"chatglm9.*Did you mean"):
        load_tokenizer(source, family="chatglm9")


def test_the_tokenizer_of_a_checkpoint_and_of_a_folder_of_its_own(
    oracles: Path, source: Path, tmp_path: Path
) -> None:
    files = oracles / "tokenizers" / "tiny_v2"
    model = tmp_path / "chatglm2-model"
    shutil.copytree(files, model)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # A model has a row for every id: tokenizer and config of two releases are refused.
    (model / "config.json").write_text(json.dumps(config | {"padded_vocab_size": 768}), encoding="utf-8")
    tokenizer = load_tokenizer(model)
    assert tokenizer.family == Family.CHATGLM2
    ids = tokenizer("abc")["input_ids"]
    tokenizer.save_pretrained(tmp_path / "alone")
    alone = load_tokenizer(tmp_path / "alone")
    assert alone.family == Family.CHATGLM2
    assert alone("abc")["input_ids"] == ids
    assert load_tokenizer(files, family="chatglm3").family == Family.CHATGLM3
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_tokenizer(tmp_path)
