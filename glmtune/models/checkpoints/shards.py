"""What the weight files of a checkpoint hold, from their headers alone; and single tensors out of them.

We read both formats by offset instead of through safetensors and `torch.load`: weights go straight into the
memory of the parameter they are for, rows can be read alone, and both are checked before a byte is loaded.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from glmtune.errors import CheckpointError

SAFETENSORS_FILE, BIN_FILE = "model.safetensors", "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CHUNK_BYTES = 4 * 2**20
"""Bytes read at once where the type changes on the way; the whole tensor aside would be 1.2 GB for the head
of a 9B model."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One stored tensor.

    Attributes:
        name: official name.
        file: the file it is in.
        offset: position of its first element in the file, bytes.
        dtype: stored type.
        shape: its shape.
        stride: elements between neighbours along each axis.
    """

    name: str
    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, last axis fastest."""
        return self.stride == _contiguous_stride(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> TensorRecord:
        """Return the record of some neighbouring rows, which are read alone."""
        offset = self.offset + start * self.stride[0] * self.dtype.itemsize
        shape = (min(stop, self.shape[0]) - start, *self.shape[1:])
        return TensorRecord(self.name, self.file, offset, self.dtype, shape, self.stride)


class OpenShards:
    """Weight files that stay open from their header to their last tensor; a context that closes them.

    A 6B release has some 200 tensors in 7 files. On network disks every open is a question to a server.
    """

    def __init__(self) -> None:
        """Begin with no file open."""
        self._streams: dict[Path, BinaryIO] = {}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

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
            CheckpointError: the file ends too early.
        """
        if record.is_contiguous:
            whole = torch.empty(record.shape, dtype=record.dtype)
            self.copy_into(whole, record)
            return whole
        # A pickle may hold views: read everything from the first element to the last, then view it alike.
        span = 1 + sum((size - 1) * step for size, step in zip(record.shape, record.stride, strict=True))
        flat = TensorRecord(record.name, record.file, record.offset, record.dtype, (span,), (1,))
        return self.read(flat).as_strided(record.shape, record.stride).contiguous()

    def copy_into(self, target: Tensor, record: TensorRecord) -> None:
        """Read one tensor into existing memory, converting the type on the way, a chunk at a time.

        Args:
            target: contiguous, of the record's shape; any float dtype, any device. Overwritten.
            record: from `read_records`.

        Raises:
            CheckpointError: the file ends too early.
        """
        assert target.is_contiguous()
        assert target.shape == record.shape
        if not record.is_contiguous:
            target.copy_(self.read(record))
            return
        flat = target.view(-1)
        stream = self.stream(record.file)
        stream.seek(record.offset)
        if target.dtype == record.dtype and target.device.type == "cpu":
            _read_exactly(stream, flat, record)
            return
        step = CHUNK_BYTES // record.dtype.itemsize
        buffer = torch.empty(min(step, flat.numel()), dtype=record.dtype)
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            chunk = buffer[: part.numel()]
            _read_exactly(stream, chunk, record)
            part.copy_(chunk)


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
                    f"{', '.join(absent)}. Download them into {folder}."
                )
            return files
        if (folder / single).is_file():
            return [folder / single]
    raise CheckpointError(
        f"{folder} holds no weights: expected {SAFETENSORS_FILE}, {BIN_FILE}, or one of them in shards with "
        f"its {INDEX_SUFFIX[1:]}. Download the checkpoint's weights into this folder."
    )


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
        for record in _records_of(file, shards.stream(file)):
            if record.name in records:
                other = records[record.name].file.name
                raise CheckpointError(
                    f"{folder}: tensor {record.name} is in {other} and in {file.name}, but each may be "
                    "stored once. Remove the shards of an older save and keep those named in the index."
                )
            records[record.name] = record
    return records


def read_tensor(record: TensorRecord) -> Tensor:
    """Open a file, read one tensor and close it; see `OpenShards.read`."""
    with OpenShards() as shards:
        return shards.read(record)


def _read_exactly(stream: BinaryIO, flat: Tensor, record: TensorRecord) -> None:
    """Fill the memory of a tensor from where the file stands."""
    array: Any = flat.detach().view(torch.uint8).numpy()  # as bytes: NumPy has no bfloat16
    view = memoryview(array)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done : done + CHUNK_BYTES])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise CheckpointError(
                f"{record.file} ends inside tensor {record.name}: {len(view)} bytes expected, {done} there. "
                "The download is incomplete; fetch the file again."
            )
        done += count


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no valid index ({error!r}). Download the file again.") from None
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index}: tensor {name} is said to be in {file!r}, but that must be the name of a file in "
                "the same folder. Download the index again."
            )
    return weight_map


def _records_of(file: Path, stream: BinaryIO) -> Iterator[TensorRecord]:
    head = stream.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{file} is only a git-lfs pointer ({file.stat().st_size} bytes), not the weights. "
            "Run `git lfs pull` in the folder, or download the file."
        )
    stream.seek(0)
    if file.suffix == ".safetensors":
        return _safetensors_records(file, stream)
    return _bin_records(file, stream, head)


def _safetensors_records(file: Path, stream: BinaryIO) -> Iterator[TensorRecord]:
    """Yield the tensors of the format's header: 8 bytes of its length, JSON, then the data, by offset."""
    size = file.stat().st_size
    try:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > size:  # a damaged file may say anything: do not ask for terabytes
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header = dict(json.loads(stream.read(length)))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise _foreign_dtype(file, name, entry["dtype"])
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            if 8 + length + end > size:
                raise ValueError(f"{name} ends at byte {8 + length + end} of {size}")
            if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} of shape {list(shape)} takes bytes {begin} to {end}")
            yield TensorRecord(name, file, 8 + length + begin, dtype, shape, _contiguous_stride(shape))
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(
            f"{file} is no complete safetensors file ({error}). The download is incomplete or damaged; "
            "fetch the file again."
        ) from None


def _foreign_dtype(file: Path, name: str, dtype: object) -> CheckpointError:
    return CheckpointError(
        f"{file}: tensor {name} is stored as {dtype}, but only {', '.join(SAFETENSORS_DTYPES)} are read. Use "
        "the official release, or one quantized in its INT8 or INT4 format."
    )


def _bin_records(file: Path, stream: BinaryIO, head: bytes) -> Iterator[TensorRecord]:
    """Yield the tensors of a file of `torch.save`: a zip of a pickle and, uncompressed, every storage.

    The pickle alone is unpickled, by PyTorch's own restricted unpickler (``weights_only``): of a stranger's
    file nothing may run. In fake mode it makes tensors without memory, and PyTorch notes at which byte of the
    zip each storage begins, so the numbers are then read like those of safetensors, without unpickling.
    """
    if not head.startswith(b"PK"):
        raise CheckpointError(
            f"{file} is no zip-based PyTorch file (it starts with {head[:4]!r}), the only kind of pickle "
            "read here. Fetch it again if the download is damaged; save it again if it predates PyTorch 1.6."
        )
    try:
        with FakeTensorMode():
            state = torch.load(stream, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{file} cannot be read as a plain state dictionary ({reason}). The download is incomplete, or "
            "the file holds other objects than tensors, which are never loaded; fetch the file again."
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, but a state dictionary is needed.")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file}: entry {name!r} is a {type(tensor).__name__}, but must be a tensor."
            )
        # Set by torch.load in fake mode: where the storage begins. A view may start inside it.
        base: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined]
        offset = base + int(tensor.storage_offset()) * tensor.dtype.itemsize
        yield TensorRecord(str(name), file, offset, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
