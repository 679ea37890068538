"""The weight files of a checkpoint: which there are, what they hold, and single tensors out of them.

We read both formats by offset instead of through safetensors and `torch.load`: weights go straight into the
memory of the parameter they are for, rows can be read alone, and both are checked before a byte is loaded.
Headers are read in ``headers.py``; the checksums that `torch.save` writes are compared here, in the one pass.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.headers import (
    CHUNK_BYTES,
    StoredBytes,
    TensorRecord,
    damaged,
    records_of,
    verify,
)
from glmtune.storage.json_files import read_json_object, shown

SAFETENSORS_FILE, BIN_FILE = "model.safetensors", "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"((?:pytorch_)?model)-([0-9]{5})-of-([0-9]{5})(\.safetensors|\.bin)")
MAX_SHARDS = 4096
"""Files that an index may name: the releases have up to 15."""


_VERIFIES: ContextVar[bool] = ContextVar("verifies", default=True)


@contextmanager
def verifying(is_on: bool) -> Generator[None]:
    """Compare checksums of the files that are opened inside, or do not.

    The bytes of a tensor are summed up in a thread of their own while the next ones are read, 0.3 s of a
    processor for each GiB; only where no processor is free does that take time.
    """
    before = _VERIFIES.set(is_on)
    try:
        yield
    finally:
        _VERIFIES.reset(before)


def is_verifying() -> bool:
    """Say whether checksums are compared now; see `verifying`."""
    return _VERIFIES.get()


class OpenShards:
    """Weight files that stay open from their header to their last tensor; a context that closes them.

    A 6B release has some 200 tensors in 7 files. On network disks every open is a question to a server.
    """

    def __init__(self) -> None:
        """Begin with no file open."""
        self._streams: dict[Path, BinaryIO] = {}
        self._verified: set[tuple[Path, StoredBytes]] = set()
        self._verifies = is_verifying()
        self._summing = ThreadPoolExecutor(1)  # starts its thread with the first checksum

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self._summing.shutdown()

    def stream(self, file: Path) -> BinaryIO:
        """Return a file opened for reading, the same one every time, wherever it stands."""
        if file not in self._streams:
            self._streams[file] = file.open("rb")
        return self._streams[file]

    def read(self, record: TensorRecord) -> Tensor:
        """Read one tensor.

        Args:
            record: from `read_records`.

        Returns:
            A tensor of the stored dtype and shape, in memory of its own.

        Raises:
            CheckpointError: the file ends too early, or its bytes are not those of its checksum.
        """
        if record.is_contiguous:
            whole = torch.empty(record.shape, dtype=record.dtype)
            self.copy_into(whole, record)
            return whole
        # A pickle may hold views: read everything from the first element to the last, then view it alike.
        flat = dataclasses.replace(record, shape=(record.span,), stride=(1,))
        return self.read(flat).as_strided(record.shape, record.stride).contiguous()

    def copy_into(self, target: Tensor, record: TensorRecord) -> None:
        """Read one tensor into existing memory, converting the type on the way, a chunk at a time.

        Args:
            target: contiguous, of the record's shape; any float dtype, any device. Overwritten.
            record: from `read_records`.

        Raises:
            CheckpointError: the file ends too early, or its bytes are not those of its checksum.
        """
        assert target.is_contiguous()
        assert target.shape == record.shape
        if not record.is_contiguous:
            target.copy_(self.read(record))
            return
        flat = target.view(-1)
        stream = self.stream(record.file)
        # A tensor that is its whole entry is summed up as it is read; one that is a part of it (a view, some
        # rows) says nothing of the rest, so the entry is read for its checksum first, once.
        sums_up = self._verifies and record.is_whole_entry and _has_checksum(record)
        checksum = _Checksum(self._summing) if sums_up else None
        if self._verifies and checksum is None and record.entry is not None:
            self._verify_once(record.file, record.entry)
        is_direct = target.dtype == record.dtype and target.device.type == "cpu"
        step = max(1, CHUNK_BYTES // record.dtype.itemsize)
        # Two, by turns: one is summed up while the next is read.
        buffers = [torch.empty(0 if is_direct else min(step, flat.numel()), dtype=record.dtype) for _ in "ab"]
        stream.seek(record.offset)
        for number, start in enumerate(range(0, flat.numel(), step)):
            part = flat[start : start + step]
            chunk = part if is_direct else buffers[number % 2][: part.numel()]
            view = _read_exactly(stream, chunk, record, start * record.dtype.itemsize)
            if checksum is not None:
                checksum.add(view)
            if not is_direct:
                part.copy_(chunk)
        if checksum is not None and record.entry is not None and checksum.value() != record.entry.crc32:
            raise damaged(record.file, f"tensor {record.name}")

    def _verify_once(self, file: Path, entry: StoredBytes) -> None:
        if (file, entry) not in self._verified:
            verify(file, self.stream(file), entry)
            self._verified.add((file, entry))


def weight_files(folder: Path) -> list[Path]:
    """List the files that hold a checkpoint's weights, safetensors before pickles.

    Args:
        folder: the checkpoint's folder.

    Returns:
        The files, each once, in the order of the index.

    Raises:
        CheckpointError: none there, or some of those in the index missing.
    """
    for single in (SAFETENSORS_FILE, BIN_FILE):
        index = folder / f"{single}{INDEX_SUFFIX}"
        if index.is_file():
            files = [folder / name for name in dict.fromkeys(_read_index(index).values())]
            absent = [file.name for file in files if not file.is_file()]
            if absent:
                raise CheckpointError(
                    f"{index} names {len(files)} files, but {len(absent)} of them are not there: "
                    f"{_listed(absent)}. Download them into {folder}."
                )
            return files
        if (folder / single).is_file():
            return [folder / single]
    if shards := _unindexed_shards(folder):
        return shards
    others = sorted(file.name for file in folder.iterdir() if file.suffix == ".safetensors")
    found = f" It holds {_listed(others)}: rename the model's to {SAFETENSORS_FILE}." if others else ""
    raise CheckpointError(
        f"{folder} holds no weights: expected {SAFETENSORS_FILE}, {BIN_FILE}, or one of them in shards."
        f"{found or ' Download the weights of the checkpoint into this folder.'}"
    )


def _unindexed_shards(folder: Path) -> list[Path]:
    """Return shards without an index: their names tell how many there are, their headers what they hold.

    Raises:
        CheckpointError: some are missing, or shards of two saves lie side by side.
    """
    found = [match for file in folder.iterdir() if (match := _SHARD.fullmatch(file.name))]
    for suffix in (".safetensors", ".bin"):
        saves = {(match[1], match[3]) for match in found if match[4] == suffix}
        if len(saves) > 1:
            counts = " and ".join(sorted(str(int(count)) for _, count in saves))
            raise CheckpointError(
                f"{folder} holds shards of several saves, in {counts} files, and no index. Remove those of "
                "the older one."
            )
        for stem, count in saves:
            total = min(int(count), MAX_SHARDS)
            files = [folder / f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, total + 1)]
            absent = [file.name for file in files if not file.is_file()]
            if absent:
                raise CheckpointError(
                    f"{folder} holds shards of {total} files, but {len(absent)} of them are not there: "
                    f"{_listed(absent)}. Download them into {folder}."
                )
            return files
    return []


def _listed(names: list[str]) -> str:
    """Word names of files for a message; thousands may be missing."""
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def read_records(folder: Path, shards: OpenShards | None = None) -> dict[str, TensorRecord]:
    """Read the headers of all weight files.

    Args:
        folder: the checkpoint's folder.
        shards: leaves the files open, for the tensors; None closes them.

    Returns:
        Official name → record.

    Raises:
        CheckpointError: files missing, damaged or of another format; a tensor stored in two files.
    """
    if shards is None:
        with OpenShards() as shards:
            return read_records(folder, shards)
    records: dict[str, TensorRecord] = {}
    for file in weight_files(folder):
        for record in records_of(file, shards.stream(file)):
            if record.name in records:
                other = records[record.name].file.name
                raise CheckpointError(
                    f"{folder}: tensor {record.name} is in {other} and in {file.name}, but each may be "
                    "stored once. Remove the shards of an older save and keep those named in the index."
                )
            records[record.name] = record
    return records


class _Checksum:
    """A CRC32 that a thread forms of one chunk while the next is read: so it costs no time of its own."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._sum: Future[int] | None = None

    def add(self, chunk: memoryview) -> None:
        """Go on with a chunk, which must not change until the next one is added."""
        self._sum = self._pool.submit(zlib.crc32, chunk, self.value())

    def value(self) -> int:
        """Return the checksum of all chunks so far."""
        return 0 if self._sum is None else self._sum.result()


def _has_checksum(record: TensorRecord) -> bool:
    return record.entry is not None and record.entry.crc32 is not None


def _read_exactly(stream: BinaryIO, flat: Tensor, record: TensorRecord, before: int) -> memoryview:
    """Fill the memory of a tensor from where the file stands, and return it as bytes.

    Args:
        stream: of the record's file.
        flat: a part of the tensor, contiguous.
        record: which tensor.
        before: bytes of it that were read already, for the message.
    """
    array: Any = flat.detach().view(torch.uint8).numpy()  # as bytes: NumPy has no bfloat16
    view = memoryview(array)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise CheckpointError(
                f"{record.file} ends inside tensor {record.name}: {record.num_bytes} bytes expected, "
                f"{before + done} there. The download is incomplete; fetch the file again."
            )
        done += count
    return view


def _read_index(index: Path) -> dict[str, str]:
    """Read which tensor is in which file; a file is one of the same folder and of the same format."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} is no valid index (`weight_map` is no object with names). Download the file again."
        )
    suffix = Path(index.name.removesuffix(INDEX_SUFFIX)).suffix
    for name, file in weight_map.items():
        # A link there is followed, as folders of the hub's cache are made of them; what it leads to is read
        # as weights or refused.
        is_name = isinstance(file, str) and Path(file).name == file and "\\" not in file
        if not is_name or not file.endswith(suffix):
            raise CheckpointError(
                f"{index}: tensor {name[:200]} is said to be in {shown(file)}, but that must be the name of "
                f"a file in the same folder that ends in {suffix}. Download the index again."
            )
    count = len(set(weight_map.values()))
    if count > MAX_SHARDS:
        raise CheckpointError(
            f"{index} names {count} files, but at most {MAX_SHARDS} are read. Download the index again."
        )
    return weight_map
