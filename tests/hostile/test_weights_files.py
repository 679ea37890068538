"""Weight files from a stranger, and files with damage: what a header says is compared with what is there."""

from __future__ import annotations

import json
import random
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.shards import MAX_SHARDS, OpenShards, read_records, weight_files
from glmtune.models.load import load_official
from glmtune.prefix.checkpoint import OFFICIAL_FILE, PREFIX_FILE, describe_prefix, load_prefix, save_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from tests.models.checkpoints.stored import read_tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "models"


def write_safetensors(file: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: list[tuple[Any, str]] = [
    ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, "b overlaps a"),
    ({"a": entry([2], 0, 8), "b": entry([1], 12, 16)}, "b leaves a hole behind a"),
    ({"a": entry([2], 0, 8)}, "its tensors end at byte"),
    ({"a": entry([10**9, 10**9], 0, 16)}, "takes bytes 0 to 16"),
    ({"a": entry([2**60, 0], 0, 0), "b": entry([4], 0, 16)}, "takes bytes 0 to 0"),
    ({"a": entry([-2, -2], 0, 16)}, "takes bytes 0 to 16"),
    ({"a": entry([4], 16, 0)}, "takes bytes 16 to 0"),
    ({"a": entry([4.0], 0, 16)}, "no list of whole numbers"),
    ({"a": entry([True, 4], 0, 16)}, "no list of whole numbers"),
    ({"a": entry(["4"], 0, 16)}, "no list of whole numbers"),
    ({"a": entry([4], 0, 2**70)}, "takes bytes"),
    ({"a": entry([4], 0, 16, "F8_E4M3")}, "stored as F8_E4M3"),
    ({"a": entry([4], 0, 16, ["F32"])}, "stored as"),
    ({"a": entry(4, 0, 16)}, "no complete safetensors file"),
    ({"a": entry([4], 0, 16) | {"data_offsets": [0]}}, "no complete safetensors file"),
    (b'{"a": {}, "a": {}}', "is there twice"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a": NaN}', "NaN is no number"),
    (b"[]", "no JSON object"),
]


@pytest.mark.parametrize(("header", "words"), HEADERS)
def test_headers_that_do_not_fit_the_bytes(header: Any, words: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", header, bytes(16))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{words}"):
        read_records(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 25, 0])
def test_a_header_of_another_length(length: int, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": entry([4], 0, 16)}, bytes(16), length=length)
    with pytest.raises(CheckpointError, match="no complete safetensors file"):
        read_records(tmp_path)


def index_of(folder: Path, weight_map: Any) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/../b.safetensors", "..\\b.safetensors", "evil.bin", "x.py", 7,
     None, ["a"], "a\x00.safetensors"],
)  # fmt: skip
def test_an_index_names_files_of_its_own_folder_and_format(name: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json"):
        weight_files(index_of(tmp_path, {"a": name}))


def test_an_index_has_bounds(tmp_path: Path) -> None:
    many = {f"t{number}": f"{number}.safetensors" for number in range(100_000)}
    with pytest.raises(CheckpointError, match=rf"names 100000 files, but at most {MAX_SHARDS} are read"):
        weight_files(index_of(tmp_path, many))
    for nothing in ({}, [], None, "x"):
        with pytest.raises(CheckpointError, match="no valid index"):
            weight_files(index_of(tmp_path, nothing))


# ---- pickles ----


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A checkpoint in one ``pytorch_model.bin``."""
    folder = tmp_path / "pickled"
    shutil.copytree(GOLDEN / "glm4", folder)
    assert [file.name for file in weight_files(folder)] == ["pytorch_model.bin"]
    return folder


def data_places(file: Path) -> list[int]:
    """Return places of bytes that mean something: in what is stored, not in the padding between."""
    with zipfile.ZipFile(file) as opened:
        raw = file.read_bytes()
        places: list[int] = []
        for info in opened.infolist():
            name, extra = struct.unpack("<HH", raw[info.header_offset + 26 : info.header_offset + 30])
            begin = info.header_offset + 30 + name + extra
            places += range(begin, begin + info.file_size)
    return places


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_flipped_bit_of_a_pickle_is_noticed(dtype: str, pickled: Path) -> None:
    file = pickled / "pytorch_model.bin"
    whole, drawn = file.read_bytes(), random.Random(5)
    load_official(pickled, dtype=dtype)
    for place in drawn.sample(data_places(file), 25):
        changed = bytearray(whole)
        changed[place] ^= 1 << drawn.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin (is damaged|cannot be read)"):
            load_official(pickled, dtype=dtype)


def test_parts_of_an_entry_are_checked_as_well(tmp_path: Path) -> None:
    whole = torch.arange(40_000.0).reshape(400, 100)
    torch.save(
        {"rows": whole[10:30], "turned": whole.T, "other": torch.ones(3)}, tmp_path / "pytorch_model.bin"
    )
    file = tmp_path / "pytorch_model.bin"
    records = read_records(tmp_path)
    assert torch.equal(read_tensor(records["rows"]), whole[10:30])
    assert torch.equal(read_tensor(records["turned"].rows(0, 100)), whole.T)
    content = bytearray(file.read_bytes())
    content[records["rows"].offset - 8] ^= 1  # in front of the rows that are read
    file.write_bytes(content)
    with OpenShards() as shards:
        for name in ("rows", "turned"):
            with pytest.raises(CheckpointError, match="is damaged"):
                shards.read(records[name])
        assert shards.read(records["other"]).sum() == 3


def test_a_file_saved_without_checksums_is_read_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_tensor(read_records(tmp_path)["a"]).sum() == 3
    assert "saved without checksums" in caplog.text


def test_views_that_repeat_a_number_make_no_terabytes(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"tensor a of shape \[1000000, 1000000\] does not lie within the 4 b"
    ):
        read_records(tmp_path)


def test_a_storage_that_says_it_is_larger_than_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(300)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as source, zipfile.ZipFile(file, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl"):
                content = content.replace(struct.pack("<H", 300), struct.pack("<H", 65_000))
            target.writestr(info.filename, content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        read_records(tmp_path)


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(300)}, tmp_path / "plain.bin")
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(tmp_path / "plain.bin") as source:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
            for info in source.infolist():
                target.writestr(info.filename, source.read(info))
    with pytest.raises(CheckpointError, match="is compressed, which PyTorch never does"):
        read_records(tmp_path)


# ---- prefixes ----


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Any:
    return load_official(tiny_base, dtype="float32", device="cpu")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_prefix_does_not_decide_how_much_memory_it_takes(legacy: bool, base: Any, tmp_path: Path) -> None:
    width = prefix_shape(base.config).kv_width
    state = {"transformer.prefix_encoder.embedding.weight": torch.ones(1).expand(4_600_000_000, width)}
    torch.save(state, tmp_path / OFFICIAL_FILE, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="could not be read as a prefix"):
        load_prefix(tmp_path, base)


@pytest.mark.parametrize(
    ("key", "value"),
    [("pre_seq_len", "1000000000000"), ("pre_seq_len", "3.0"), ("num_layers", "-1"), ("head_dim", '"x"'),
     ("prefix_projection", "true"), ("base_source", "[1]"), ("template", "7"), ("num_kv_heads", "9" * 400)],
)  # fmt: skip
def test_metadata_of_a_prefix_is_compared_with_its_weights(
    key: str, value: str, base: Any, tmp_path: Path
) -> None:
    from safetensors import safe_open

    file = save_prefix(PrefixEncoder(prefix_shape(base.config), pre_seq_len=3), tmp_path)
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    save_file(load_file(file), file, {**metadata, key: value})
    with pytest.raises(CheckpointError, match=rf"says {key} = .*but it must be"):
        describe_prefix(file)
    with pytest.raises(CheckpointError, match=rf"says {key} = "):
        load_prefix(file, base)


@pytest.mark.parametrize("shape", [(0, 64), (64,), (), (2, 3, 64)])
def test_matrices_of_a_prefix_fit_each_other(shape: tuple[int, ...], base: Any, tmp_path: Path) -> None:
    save_file({"embedding.weight": torch.ones(shape)}, tmp_path / PREFIX_FILE)
    with pytest.raises(CheckpointError, match=r"holds no prefix encoder: embedding\.weight is \["):
        load_prefix(tmp_path, base)
    width = prefix_shape(base.config).kv_width
    shapes = {"embedding.weight": (3, 8), "trans.0.weight": (5, 8), "trans.0.bias": (5,)}
    shapes |= {"trans.2.weight": (width, 6), "trans.2.bias": (width,)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / PREFIX_FILE)
    with pytest.raises(CheckpointError, match=r"trans\.2\.weight is \[\d+, 6\], but .* must be \[\d+, 5\]"):
        load_prefix(tmp_path, base)


@pytest.mark.parametrize("name", [PREFIX_FILE, OFFICIAL_FILE])
def test_a_flipped_bit_of_an_official_prefix_is_noticed(name: str, base: Any, tmp_path: Path) -> None:
    from glmtune.prefix.checkpoint import export_official_prefix

    encoder = PrefixEncoder(prefix_shape(base.config), pre_seq_len=3)
    export_official_prefix(encoder, tmp_path)
    file, drawn = tmp_path / OFFICIAL_FILE, random.Random(3)
    whole = file.read_bytes()
    for place in drawn.sample(data_places(file), 30):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="could not be read as a prefix"):
            load_prefix(file, base)


# ---- anything ----

VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "F8_E4M3", "x"]) | VALUE,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | VALUE,
        "data_offsets": st.lists(st.integers(-4, 40), min_size=1, max_size=3) | VALUE,
    }
)


@pytest.mark.parametrize("examples", [80, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_header_is_read_within_its_bytes_or_refused(examples: int, tmp_path: Path) -> None:
    @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.dictionaries(st.text(max_size=4), ENTRY | VALUE, max_size=3), st.binary(max_size=40))
    def read(header: dict[str, Any], data: bytes) -> None:
        write_safetensors(tmp_path / "model.safetensors", header, data)
        try:
            records = read_records(tmp_path)
        except CheckpointError as error:
            assert "model.safetensors" in str(error)
            return
        assert sum(record.num_bytes for record in records.values()) == len(data)
        for record in records.values():
            assert read_tensor(record).shape == record.shape

    read()


@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_damage_to_a_pickle_is_refused_or_changes_nothing(examples: int, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.float16)}
    torch.save(tensors, file)
    whole = file.read_bytes()

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, len(whole) - 1), st.binary(max_size=4), st.integers(0, 4))
    def read(place: int, new: bytes, gone: int) -> None:
        file.write_bytes(whole[:place] + new + whole[place + gone :])
        try:
            found = {name: read_tensor(record) for name, record in read_records(tmp_path).items()}
        except CheckpointError as error:
            assert "pytorch_model.bin" in str(error)
            return
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

    read()
