"""Saving, finding, loading, refusing and exporting prefixes."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GlmForCausalLM

from glmtune.errors import CheckpointError
from glmtune.prefix.checkpoint import (
    OFFICIAL_FILE,
    PREFIX_FILE,
    PrefixMeta,
    describe_prefix,
    export_official_prefix,
    find_prefix,
    load_prefix,
    save_prefix,
)
from glmtune.prefix.encoder import PrefixEncoder
from glmtune.storage import files
from glmtune.version import __version__
from tests.prefix.conftest import make_base, make_prefix

META = PrefixMeta("a" * 64, "glm-tiny", "chatglm2", "数据指纹")


class Named(GlmForCausalLM):
    """A base that can say which weights it has."""

    source = "here"

    parent_is_unknown = False

    def fingerprint(self) -> str:
        return "b" * 64

    def is_base(self, fingerprint: str) -> bool:
        return fingerprint == self.fingerprint()


def _named() -> GlmForCausalLM:
    return Named(make_base().config)


def _same(one: PrefixEncoder, other: PrefixEncoder) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_one_prefix_is_one_file(tmp_path: Path) -> None:
    """In other processes, too: the library writes metadata in an order of chance."""
    encoder = make_prefix(make_base(), length=6, projection=True)
    contents = {save_prefix(encoder, tmp_path / str(n), meta=META).read_bytes() for n in range(20)}
    assert len(contents) == 1
    header = json.loads(next(iter(contents))[8:].partition(b'"dtype"')[0].rpartition(b'},"')[0] + b"}}")
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_comes_back_bit_for_bit_with_its_facts(tmp_path: Path, projection: bool) -> None:
    model = make_base()
    encoder = make_prefix(model, length=6, projection=projection)
    file = save_prefix(encoder, tmp_path / "new" / "folder", meta=META)
    assert file == tmp_path / "new" / "folder" / PREFIX_FILE
    assert os.listdir(file.parent) == [PREFIX_FILE]
    loaded = load_prefix(file, model)
    assert _same(loaded, encoder)
    assert (loaded.pre_seq_len, loaded.prefix_projection) == (6, projection)
    facts = describe_prefix(file)
    assert (facts.file, facts.pre_seq_len, facts.prefix_projection, facts.meta) == (file, 6, projection, META)
    with safe_open(file, framework="pt") as opened:
        facts = {key: json.loads(value) for key, value in opened.metadata().items()}
    assert facts["pre_seq_len"] == 6
    assert facts["prefix_projection"] is projection
    assert facts["base_fingerprint"] == "a" * 64
    assert facts["glmtune_version"] == __version__
    assert (facts["num_layers"], facts["num_kv_heads"], facts["head_dim"]) == (2, 2, 8)


@pytest.mark.parametrize("projection", [False, True])
def test_official_round_trip(tmp_path: Path, projection: bool) -> None:
    model = make_base()
    encoder = make_prefix(model, projection=projection)
    export_official_prefix(encoder, tmp_path, config={"num_layers": 2, "pre_seq_len": None})
    stored = torch.load(tmp_path / OFFICIAL_FILE, weights_only=True)
    assert set(stored) == {f"transformer.prefix_encoder.{name}" for name in encoder.state_dict()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"num_layers": 2, "pre_seq_len": 5, "prefix_projection": projection}
    for place in (tmp_path, tmp_path / OFFICIAL_FILE):
        assert _same(load_prefix(place, model), encoder)
    facts = describe_prefix(tmp_path)
    assert (facts.pre_seq_len, facts.prefix_projection) == (5, projection)
    assert facts.meta == PrefixMeta(glmtune_version="")


def test_released_files_come_back_as_the_release_reads_them(tmp_path: Path) -> None:
    model = make_base()
    encoder = make_prefix(model)
    export_official_prefix(encoder, tmp_path, config={"multi_query_group_num": 2})
    config = json.loads((tmp_path / "config.json").read_text())
    config["prefix_projection"] = [[False]]  # a public copy of the code nests it once more with every save
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = torch.load(tmp_path / OFFICIAL_FILE, weights_only=True)
    torch.save({name: weight.half() for name, weight in stored.items()}, tmp_path / OFFICIAL_FILE)
    loaded = load_prefix(tmp_path, model)
    assert loaded.prefix_projection is False
    assert torch.equal(loaded.embedding.weight, encoder.embedding.weight.half().float())
    (tmp_path / "config.json").unlink()
    assert load_prefix(tmp_path, model).pre_seq_len == 5


def test_a_run_folder_leads_to_its_last_prefix(tmp_path: Path) -> None:
    encoder = make_prefix(make_base())
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-old"):
        save_prefix(encoder, tmp_path / name)
    (tmp_path / "checkpoint-200").mkdir()  # without a prefix
    assert find_prefix(tmp_path).parent.name == "checkpoint-100"
    assert find_prefix(tmp_path / "checkpoint-9").parent.name == "checkpoint-9"
    (tmp_path / "last").symlink_to("checkpoint-9")
    assert find_prefix(tmp_path).parent.name == "last"
    save_prefix(encoder, tmp_path)
    export_official_prefix(encoder, tmp_path)
    assert find_prefix(str(tmp_path)) == tmp_path / PREFIX_FILE


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"No prefix at .*prefix_encoder.safetensors.*Give the run folder"
    ):
        find_prefix(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere`.*the path does not exist"):
        load_prefix(tmp_path / "nowhere", make_base())


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("change", [{"num_hidden_layers": 4}, {"head_dim": 16}])
def test_another_geometry_is_refused(tmp_path: Path, projection: bool, change: dict[str, int]) -> None:
    save_prefix(make_prefix(make_base(**change), projection=projection), tmp_path)
    layers, size = change.get("num_hidden_layers", 2), change.get("head_dim", 8)
    expected = (
        rf"made for {layers} layers x 2 key/value heads x head_dim {size} \(128 numbers.*"
        r"has 2 layers x 2 key/value heads x head_dim 8 \(64 numbers.*base it was trained on"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_prefix(tmp_path, make_base(), check_base=False)


def test_another_geometry_of_equal_width_is_refused(tmp_path: Path) -> None:
    save_prefix(make_prefix(make_base(num_hidden_layers=4, num_key_value_heads=1)), tmp_path)
    with pytest.raises(CheckpointError, match=r"4 layers x 1 key/value heads .*\(64 .*2 layers x 2 .*\(64"):
        load_prefix(tmp_path, make_base())


def test_an_official_prefix_of_another_width_is_refused(tmp_path: Path) -> None:
    export_official_prefix(make_prefix(make_base(num_hidden_layers=4)), tmp_path)
    with pytest.raises(CheckpointError, match=r"a geometry it does not name \(128 numbers.*\(64 numbers"):
        load_prefix(tmp_path, make_base())


def test_another_base_is_refused_by_fingerprint(tmp_path: Path) -> None:
    encoder = make_prefix(make_base())
    save_prefix(encoder, tmp_path, meta=META)
    expected = r"`glm-tiny` with fingerprint a{16}, but the model `here` has b{16}.*check_base=False"
    with pytest.raises(CheckpointError, match=expected):
        load_prefix(tmp_path, _named())
    assert _same(load_prefix(tmp_path, _named(), check_base=False), encoder)
    save_prefix(encoder, tmp_path, meta=PrefixMeta(base_fingerprint="b" * 64))
    assert _same(load_prefix(tmp_path, _named()), encoder)


def test_a_file_without_a_prefix_is_refused(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    expected = r"missing \(embedding.weight\) and 1 do not belong.*It holds: lm_head.weight"
    with pytest.raises(CheckpointError, match=expected):
        load_prefix(tmp_path / "model.safetensors", make_base())
    incomplete = {"transformer.prefix_encoder.embedding.weight": torch.zeros(5, 64)}
    incomplete["transformer.prefix_encoder.trans.0.weight"] = torch.zeros(32, 64)
    torch.save(incomplete, tmp_path / OFFICIAL_FILE)
    with pytest.raises(CheckpointError, match=r"3 of its tensors are missing \(trans.0.bias, trans.2.bias"):
        load_prefix(tmp_path, make_base())


@pytest.mark.parametrize("name", [PREFIX_FILE, OFFICIAL_FILE])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    encoder = make_prefix(make_base())
    save_prefix(encoder, tmp_path)
    export_official_prefix(encoder, tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    with pytest.raises(CheckpointError, match=rf"{name}` could not be read as a prefix.*damaged"):
        load_prefix(tmp_path / name, make_base())


def test_pickled_code_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"transformer.prefix_encoder.embedding.weight": Evil()}, tmp_path / OFFICIAL_FILE)
    with pytest.raises(CheckpointError, match="could not be read"):
        load_prefix(tmp_path, make_base())
    (tmp_path / OFFICIAL_FILE).write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(CheckpointError, match="could not be read"):
        load_prefix(tmp_path, make_base())
    assert not (tmp_path / "executed").exists()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base()
    old = make_prefix(model, seed=1)
    save_prefix(old, tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_prefix(make_prefix(model, seed=2), tmp_path)
    assert os.listdir(tmp_path) == [PREFIX_FILE]
    assert _same(load_prefix(tmp_path, model), old)
