"""A config.json and a tokenizer from a stranger: sizes are those of the weights, or nothing is built."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmtune.errors import CheckpointError, ConfigError, GlmtuneError
from glmtune.loading import load_tokenizer
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.checkpoints.sizes import num_parameters
from glmtune.models.describe import describe
from glmtune.models.load import load_config, load_official
from glmtune.models.placeholders import load_placeholders
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.planning.geometry import read_geometry
from glmtune.training.adapt import fresh_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "padded_vocab_size", "num_attention_heads")


def changed(source: Path, folder: Path, **values: Any) -> Path:
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was built before its sizes were checked")

    monkeypatch.setattr("glmtune.models.load.build_model", never)
    monkeypatch.setattr("glmtune.models.placeholders.build_model", never)


@pytest.mark.parametrize("load", [load_official, lambda folder: load_placeholders(folder, dtype=None)])
@pytest.mark.parametrize(
    ("generation", "values", "words"),
    [
        ("chatglm2", {"num_layers": 10_000}, r"num_layers is 10000, but the weights have 2 blocks"),
        ("chatglm2", {"hidden_size": 2**20}, r"hidden_size is 1048576, but the weights have \d+ numbers of a"),
        ("chatglm2", {"padded_vocab_size": 2**24}, r"padded_vocab_size is 16777216, but the weights have \d+ r"),
        ("chatglm2", {"ffn_hidden_size": 2**24}, r"ffn_hidden_size is 16777216, but the weights have \d+ rows"),
        ("chatglm2", {"kv_channels": 2**24}, r"num_attention_heads, kv_channels .* rows of query_key_value"),
        ("chatglm", {"num_layers": 9999}, r"num_layers is 9999, but the weights have 2 blocks"),
        ("chatglm", {"vocab_size": 2**24}, r"vocab_size is 16777216, but the weights have \d+ rows"),
        ("chatglm", {"inner_hidden_size": 2**24}, r"inner_hidden_size is 16777216, but the weights have \d+ r"),
        ("chatglm", {"hidden_size": 2**20}, r"hidden_size is 1048576, but the weights have \d+ numbers"),
    ],
)  # fmt: skip
def test_sizes_are_compared_with_the_weights_before_anything_is_built(
    load: Any,
    generation: str,
    values: dict[str, int],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = changed(GOLDEN / "models" / generation, tmp_path / "changed", **values)
    never_built(monkeypatch)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=words):
        load(folder)
    assert time.monotonic() - began < 10


NO_SIZES: tuple[Any, ...] = (
    10**6, 10**9, 10**400, -1, 0, 1e9, 2.0, True, "28", None, [28], {"n": 28},
)  # fmt: skip


@pytest.mark.parametrize("value", NO_SIZES)
@pytest.mark.parametrize("read", [load_official, describe, lambda folder: read_geometry(str(folder))])
def test_no_size_at_all(value: Any, read: Any, tmp_path: Path) -> None:
    folder = changed(GOLDEN / "models" / "chatglm2", tmp_path / "changed", num_layers=value)
    with pytest.raises(
        CheckpointError, match=rf"{folder}/config.json cannot be used:\n- num_layers is "
    ) as caught:
        read(folder)
    assert "a whole number from 1 to 10000" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_ratio", 10**400), ("layernorm_epsilon", 10**400), ("seq_length", 2**40), ("pre_seq_len", 10**12),
        ("eos_token_id", [2**60]), ("pad_token_id", -1), ("quantization_bit", True), ("quantization_bit", 4.0),
        ("glmtune_quantization", {"bits": 10**9}), ("glmtune_quantization", {"bits": 4, "group_size": 0}),
        ("glmtune_quantization", {"bits": 4, "skipped": [7]}), ("glmtune_quantization", [4]),
        ("glmtune_quantization", {"bits": 4, "evil": 1}), ("attention_dropout", "nan"),
    ],
)  # fmt: skip
def test_other_values_have_a_kind_and_a_bound(key: str, value: Any, tmp_path: Path) -> None:
    folder = changed(GOLDEN / "models" / "chatglm2", tmp_path / "changed", **{key: value})
    with pytest.raises(CheckpointError, match=rf"config.json cannot be used:\n- {key} is "):
        load_official(folder)


@pytest.mark.parametrize(
    "text",
    [
        '{"num_layers": NaN}',
        '{"a": 1, "a": 2}',
        "[" * 200_000,
        '{"num_layers": ' + "9" * 5000 + "}",
        "[]",
        "\xff",
        "",
    ],
)
def test_files_that_are_no_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json (is no valid JSON|holds a list)"):
        read_config(tmp_path)


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # sparse: a terabyte in no space
    with pytest.raises(CheckpointError, match=r"has 1099511627776 bytes, at most \d+ are read"):
        read_config(tmp_path)


def test_a_model_from_scratch_is_bounded_by_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = changed(GOLDEN / "models" / "chatglm2", tmp_path / "huge", num_layers=9999, padded_vocab_size=2**24,
                     hidden_size=2**20, ffn_hidden_size=2**20)  # fmt: skip

    def never(*_: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr("glmtune.training.adapt.build_model", never)
    with pytest.raises(
        ConfigError, match=r"[\d,]+ parameters \(9999 layers, width 1048576.* GiB in float32.*has"
    ):
        fresh_model(str(folder), device="cpu", family=None)


@pytest.mark.parametrize("generation", ["chatglm", "chatglm2", "per-head"])
def test_parameters_are_counted_without_a_model(generation: str) -> None:
    folder = GOLDEN / "models" / generation
    model = load_official(folder)
    assert num_parameters(load_config(folder, folder)) == sum(
        {id(p): p.numel() for p in model.parameters()}.values()
    )


# ---- tokenizers ----


def test_a_vocabulary_cut_between_two_entries_is_refused(tmp_path: Path, released_tokenizers: Path) -> None:
    whole = (released_tokenizers / "chatglm-6b" / "ice_text.model").read_bytes()
    for end in _entry_ends(whole)[:: len(_entry_ends(whole)) // 7][1:]:
        (tmp_path / "ice_text.model").write_bytes(whole[:end])
        with pytest.raises(
            CheckpointError,
            match=r"ice_text\.model .*(is not complete: it has \d+ pieces|is no sentencepiece model)",
        ):
            load_tokenizer_folder(tmp_path, Family.CHATGLM)
    ends = _entry_ends(whole)
    (tmp_path / "ice_text.model").write_bytes(whole[: ends[-2]])  # all pieces, no normalization
    with pytest.raises(CheckpointError, match="130344 pieces but not"):
        load_tokenizer_folder(tmp_path, Family.CHATGLM)
    (tmp_path / "ice_text.model").write_bytes(whole)
    assert load_tokenizer_folder(tmp_path, Family.CHATGLM).vocab_size == 130344


def _entry_ends(content: bytes) -> list[int]:
    ends, place = [], 0
    while place < len(content):
        place, length, shift = place + 1, 0, 0
        while True:
            byte = content[place]
            place, length, shift = place + 1, length | (byte & 127) << shift, shift + 7
            if byte < 128:
                break
        place += length
        ends.append(place)
    return ends


def test_ranks_that_are_cut_at_a_line_do_not_fit_the_model(oracles: Path, tmp_path: Path) -> None:
    source = oracles / "tokenizers" / "tiny_glm4"
    lines = (source / "tokenizer.model").read_bytes().splitlines(keepends=True)
    count = len(lines) + 14
    (tmp_path / "config.json").write_text(
        json.dumps({"padded_vocab_size": count + 209, "eos_token_id": [len(lines), len(lines) + 7]})
    )
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    assert load_tokenizer_folder(tmp_path, Family.GLM4).vocab_size == len(lines)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:-20]))
    with pytest.raises(
        CheckpointError, match=rf"eos_token_id = \[{len(lines)}, .*has the id {len(lines) - 20}"
    ):
        load_tokenizer_folder(tmp_path, Family.GLM4)
    (tmp_path / "config.json").write_text(json.dumps({"padded_vocab_size": count + 5000}))
    with pytest.raises(
        CheckpointError, match=rf"{count + 5000} rows, of which releases leave at most 1024 unused"
    ):
        load_tokenizer_folder(tmp_path, Family.GLM4)
    (tmp_path / "config.json").write_text(json.dumps({"padded_vocab_size": count - 100}))
    with pytest.raises(CheckpointError, match=rf"but the model beside it has {count - 100}"):
        load_tokenizer_folder(tmp_path, Family.GLM4)


@pytest.mark.parametrize(
    "values",
    [
        {"padding_side": "up"}, {"added_tokens_decoder": 7}, {"added_tokens_decoder": {"x": {}}},
        {"num_image_tokens": 10**20}, {"num_image_tokens": -1}, {"num_image_tokens": "x"}, {"model_max_length": {}},
        {"special": [[[]]], "pad_token": 7}, {"eos_token": {"content": 1}},
    ],
)  # fmt: skip
def test_settings_of_a_tokenizer_end_in_one_or_an_error_of_ours(
    values: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN / "tokenizers" / "chatglm", tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(values))
    try:
        tokenizer = load_tokenizer_folder(tmp_path / "t", Family.CHATGLM)
    except GlmtuneError as error:
        assert "tokenizer_config.json" in str(error)
        return
    assert len(tokenizer.get_vocab()) < 10_000


def test_remote_code_of_a_tokenizer_is_not_run(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    shutil.copytree(tiny_tokenizer_folder, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


# ---- anything ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("examples", [40, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("generation", ["chatglm", "chatglm2", "glm4"])
def test_any_config_loads_or_is_an_error_of_ours(generation: str, examples: int, tmp_path: Path) -> None:
    folder = changed(GOLDEN / "models" / generation, tmp_path / "changed")
    official = json.loads((folder / "config.json").read_text())

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(
        st.dictionaries(st.sampled_from(sorted(official)) | st.text(max_size=8), JSON, min_size=1, max_size=3)
    )
    def load(values: dict[str, Any]) -> None:
        (folder / "config.json").write_text(json.dumps({**official, **values}))
        try:
            model = load_official(folder)
            with torch.no_grad():
                model(input_ids=torch.tensor([[3, 5, 8]]))
        except GlmtuneError:  # of loading; or ChatGLM-6B's of a row without [gMASK]
            return

    load()
