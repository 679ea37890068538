"""`glmtune info` says what is there, from headers alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from glmtune.cli import main
from glmtune.models.load import load_official
from glmtune.prefix.checkpoint import PrefixMeta, save_prefix
from glmtune.prefix.init import build_prefix_encoder
from glmtune.prefix.settings import PrefixSettings


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")


def test_machine_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("torch", torch.__version__, "cores", "chatglm2-6b", "glm-tiny"))


def test_checkpoint(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tiny_base)]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("chatglm2", "parameters", "layers", "weight files"))


def test_prefix(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_official(tiny_base, dtype=torch.float32)
    encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=7))
    save_prefix(encoder, tmp_path, meta=PrefixMeta(base_source="the-base", template="chatglm2"))
    assert main(["info", f"prefix_path={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("pre_seq_len" in line and "7" in line for line in lines)
    assert any("base " in line and "the-base" in line for line in lines)


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


def lines_of(source: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, str]:
    """Run ``glmtune info model=PATH`` and return its table."""
    assert main(["info", f"model={source}", *more]) == 0
    rows = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2}


@pytest.mark.parametrize(
    ("name", "generation", "heads", "tokens"),
    [
        ("v1/checkpoint_bin", "first", "4 x 12, 4", "mask 160, gmask 161, bos 164, eos 165, pad 3"),
        ("v1/checkpoint_bin_sharded", "first", "4 x 12, 4", "gmask 161"),
        ("v1_l28/checkpoint_safetensors", "first", "2 x 12, 2", "gmask 101"),
        ("v1_1d/checkpoint_safetensors", "first", "2 x 16, 2", "gmask 101"),
        ("v2/checkpoint_bin_sharded", "second", "4 x 16, 2", "eos 2, pad 0"),
        ("v2_32k/checkpoint_safetensors", "second", "4 x 16, 2", "eos 2"),
        ("glm3/checkpoint_bin", "third", "4 x 16, 1", "eos 2"),
        ("glm3_32k/checkpoint_safetensors", "third", "4 x 16, 2", "eos"),
        ("glm4/checkpoint_bin", "fourth", "4 x 16, 2", "eos ["),
    ],
)
def test_every_oracle_checkpoint(
    name: str, generation: str, heads: str, tokens: str, oracles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = {"v2_32k": "chatglm2-32k", "glm3_32k": "chatglm3-32k", "glm3": "chatglm3"}.get(
        name.split("/")[0]
    )
    more = [f"model.family={family}"] if family else []
    rows = lines_of(oracles / name, capsys, *more)
    assert rows["generation"].startswith(generation)
    assert rows["heads"].startswith(heads)
    assert tokens in rows["special tokens"]
    assert "from config.json; there are no tokenizer files" in rows["special tokens"]
    assert (rows["quantization"], rows["prefix"]) == ("none", "none")
    assert rows["weight files"].startswith(("pytorch_model", "model"))


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("v1/int8", "int8, 8 bits: query_key_value (2), dense (2), dense_h_to_4h (2), dense_4h_to_h (2); embeddings: no"),
        ("v1/int4_embeddings", "int4, 4 bits: query_key_value (2), dense (2), dense_h_to_4h (2), dense_4h_to_h (2), lm_head (1); embeddings: yes"),
        ("v2/int4", "int4, 4 bits: query_key_value (2), dense (2), dense_h_to_4h (2), dense_4h_to_h (2); embeddings: no"),
    ],
)  # fmt: skip
def test_quantized_oracles(
    name: str, quantization: str, oracles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines_of(oracles / name, capsys)["quantization"] == quantization


@pytest.mark.parametrize("name", ["v1", "v2", "v2_32k", "glm3"])
@pytest.mark.parametrize("kind", ["embedding", "projection"])
def test_prefix_oracles(name: str, kind: str, oracles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = oracles / name / f"ptuning_{kind}"
    if not folder.is_dir():
        pytest.skip(f"no {folder.name} of {name}")
    more = ["model.family=chatglm2-32k"] if name == "v2_32k" else []
    projection = str(kind == "projection").lower()
    assert lines_of(folder, capsys, *more)["prefix"] == f"8 tokens, projection {projection} (weights inside)"


def test_option_oracles(oracles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = sorted(folder for folder in (oracles / "v2_options").iterdir() if folder.is_dir())
    assert folders
    for folder in folders:
        assert lines_of(folder, capsys)["generation"] == "second (family chatglm2)"


@pytest.mark.parametrize(
    ("tokenizer", "checkpoint", "expected"),
    [
        ("tiny_v1", "v1/checkpoint_bin", "[gMASK]"),
        ("tiny_v2", "v2/checkpoint_bin", "[gMASK]"),
        ("tiny_glm4", "glm4/checkpoint_bin", "<|assistant|>"),
    ],
)
def test_special_tokens_come_from_the_tokenizer(
    tokenizer: str,
    checkpoint: str,
    expected: str,
    oracles: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for place in (oracles / checkpoint, oracles / "tokenizers" / tokenizer):
        for file in place.iterdir():
            shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    # A model has a row for every id: a tokenizer of more is refused as one of another release.
    rows_of = "padded_vocab_size" if "padded_vocab_size" in config else "vocab_size"
    del config[rows_of]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = lines_of(tmp_path, capsys)
    assert expected in rows["special tokens"]
    assert rows["special tokens"].endswith("(from the tokenizer)")


def test_a_preset_by_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "model=glm-tiny"]) == 0
    assert "[gMASK]" in capsys.readouterr().out
