"""Which tensors a weight file holds and where, from its header alone: safetensors, and zips of `torch.save`.

Headers are a stranger's words. What one says of a tensor (type, shape, place) is compared with the bytes that
are there before anything is made of that size: a file of a kilobyte may claim a terabyte.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from glmtune.errors import CheckpointError
from glmtune.storage.json_files import MAX_JSON_BYTES, parse_json, shown

LOGGER = logging.getLogger(__name__)

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
LOCAL_HEADER = struct.Struct("<26xHH")
"""Of an entry of a zip file: fixed fields, then the lengths of its name and of its extra field."""
CHUNK_BYTES = 4 * 2**20
"""Bytes read at once: of a tensor whose type changes on the way (the whole aside would be 1.2 GB for the head
of a 9B model), and of what a checksum is formed of, which is then still in the processor's cache."""


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """An entry of a zip file, as its directory describes it.

    Attributes:
        offset: position of its first byte in the file.
        num_bytes: its length.
        crc32: checksum of its bytes; None where the file was saved without checksums.
    """

    offset: int
    num_bytes: int
    crc32: int | None


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
        entry: the zip entry it lies in, whose checksum covers it; None in safetensors, which has none.
    """

    name: str
    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    entry: StoredBytes | None = None

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, last axis fastest."""
        return self.stride == _contiguous_stride(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Elements from its first to its last, both included."""
        if not math.prod(self.shape):
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def is_whole_entry(self) -> bool:
        """Whether its elements, in their order, are all the bytes of its zip entry."""
        entry = self.entry
        return entry is not None and (self.offset, self.num_bytes) == (entry.offset, entry.num_bytes)

    def rows(self, start: int, stop: int) -> TensorRecord:
        """Return the record of some neighbouring rows, which are read alone."""
        offset = self.offset + start * self.stride[0] * self.dtype.itemsize
        shape = (min(stop, self.shape[0]) - start, *self.shape[1:])
        return dataclasses.replace(self, offset=offset, shape=shape)


def records_of(file: Path, stream: BinaryIO) -> Iterable[TensorRecord]:
    """Read the header of a weight file.

    Args:
        file: its name; the suffix tells the format.
        stream: opened at its beginning.

    Raises:
        CheckpointError: damaged, of another format, or a git-lfs pointer.
    """
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


# ---- safetensors ----


def _safetensors_records(file: Path, stream: BinaryIO) -> list[TensorRecord]:
    """Return the tensors of the format's header: 8 bytes of its length, JSON, then the data, by offset."""
    size = file.stat().st_size
    try:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(size - 8, MAX_JSON_BYTES):
            raise ValueError(f"header of {length} bytes in a file of {size}, at most {MAX_JSON_BYTES}")
        header = parse_json(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
        header.pop("__metadata__", None)
        records = [_safetensors_record(file, name, entry, 8 + length) for name, entry in header.items()]
        _check_places(records, 8 + length, size)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(
            f"{file} is no complete safetensors file ({error}). The download is incomplete or damaged; "
            "fetch the file again."
        ) from None
    return records


def _safetensors_record(file: Path, name: str, entry: Mapping[str, Any], data: int) -> TensorRecord:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in SAFETENSORS_DTYPES:
        raise _foreign_dtype(file, name, entry["dtype"])
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in (*shape, begin, end)):
        raise ValueError(f"shape or place of {shown(name)} is no list of whole numbers")
    dtype = SAFETENSORS_DTYPES[entry["dtype"]]
    # A length of 0 beside a huge one makes no bytes, but a tensor that no check of bytes would stop.
    is_possible = 0 <= begin <= end and all(0 <= length < 2**48 for length in shape)
    if not is_possible or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{shown(name)} of shape {shown(list(shape))} takes bytes {begin} to {end}")
    return TensorRecord(name, file, data + begin, dtype, shape, _contiguous_stride(shape))


def _check_places(records: Iterable[TensorRecord], data: int, size: int) -> None:
    """Refuse tensors that overlap, leave holes, or do not end where the file ends, as the format has it."""
    place, last = data, ""
    for record in sorted(records, key=lambda record: (record.offset, record.num_bytes)):
        if record.offset + record.num_bytes > size:
            raise ValueError(f"{record.name} ends at byte {record.offset + record.num_bytes} of {size}")
        if record.offset != place:
            what = "overlaps" if record.offset < place else "leaves a hole behind"
            raise ValueError(f"{record.name} {what} {last or 'the header'}")
        place, last = record.offset + record.num_bytes, record.name
    if place != size:
        raise ValueError(f"its tensors end at byte {place} of {size}")


def _foreign_dtype(file: Path, name: str, dtype: object) -> CheckpointError:
    return CheckpointError(
        f"{file}: tensor {name} is stored as {dtype}, but only {', '.join(SAFETENSORS_DTYPES)} are read. Use "
        "the official release, or one quantized in its INT8 or INT4 format."
    )


# ---- zip files of torch.save ----


def _bin_records(file: Path, stream: BinaryIO, head: bytes) -> list[TensorRecord]:
    """Return the tensors of a file of `torch.save`: a zip of a pickle and, uncompressed, every storage.

    The pickle alone is unpickled, by PyTorch's own restricted unpickler (``weights_only``): of a stranger's
    file nothing may run. In fake mode it makes tensors without memory, and PyTorch notes at which byte of the
    zip each storage begins, so the numbers are then read like those of safetensors, without unpickling.
    """
    if not head.startswith(b"PK"):
        raise CheckpointError(
            f"{file} is no zip-based PyTorch file (it starts with {head[:4]!r}), the only kind of pickle "
            "read here. Fetch it again if the download is damaged; save it again if it predates PyTorch 1.6."
        )
    entries = _checked_directory(file, stream)
    stream.seek(0)
    try:
        with FakeTensorMode():
            state = torch.load(stream, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, MemoryError, OverflowError,
            TypeError, AttributeError, ValueError, OSError) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{file} cannot be read as a plain state dictionary ({reason}). The download is incomplete, or "
            "the file holds other objects than tensors, which are never loaded; fetch the file again."
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, but a state dictionary is needed.")
    return [_bin_record(file, name, tensor, entries) for name, tensor in state.items()]


def _bin_record(file: Path, name: object, tensor: object, entries: Mapping[int, StoredBytes]) -> TensorRecord:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{file}: entry {name!r} is a {type(tensor).__name__}, but must be a tensor.")
    # Set by torch.load in fake mode: where the storage begins. A view may start inside it.
    base: int = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
    offset = base + int(tensor.storage_offset()) * tensor.dtype.itemsize
    entry = entries.get(base)
    record = TensorRecord(
        str(name), file, offset, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), entry
    )
    # The pickle may say anything of a storage: a view that repeats one number makes terabytes of four bytes.
    room = -1 if entry is None else (entry.offset + entry.num_bytes - offset) // record.dtype.itemsize
    if offset < base or max(record.span, math.prod(record.shape)) > room:
        raise CheckpointError(
            f"{file}: tensor {name} of shape {list(record.shape)} does not lie within the "
            f"{0 if entry is None else entry.num_bytes} bytes that are stored for it. The file is damaged or "
            "was made to look larger than it is; fetch it again."
        )
    return record


def _checked_directory(file: Path, stream: BinaryIO) -> dict[int, StoredBytes]:
    """Read a zip's directory and check what PyTorch reads of the file besides the storages.

    PyTorch does not look at the checksums of its own files: a flipped bit in the pickle names another tensor,
    one in a storage is another weight. Storages are checked when they are read (`OpenShards`).

    Returns:
        Position of the first byte → entry.
    """
    try:
        with zipfile.ZipFile(stream) as opened:
            infos = opened.infolist()
            # `torch.serialization.set_crc32_options(False)` writes zeros; one zero alone is a checksum.
            has_checksums = any(info.CRC for info in infos)
            entries = list(_entries(stream, infos, has_checksums))
        if not has_checksums:
            LOGGER.warning("%s was saved without checksums: damage to it cannot be noticed.", file)
        for info, entry in zip(infos, entries, strict=True):
            if "/data/" not in info.filename:
                verify(file, stream, entry)
        return {entry.offset: entry for entry in entries}
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as a file of PyTorch ({error}). The download is incomplete or damaged; "
            "fetch the file again."
        ) from None


def _entries(
    stream: BinaryIO, infos: Iterable[zipfile.ZipInfo], has_checksums: bool
) -> Iterator[StoredBytes]:
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"{info.filename} is compressed, which PyTorch never does")
        stream.seek(info.header_offset)
        name_length, extra_length = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
        offset = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        yield StoredBytes(offset, info.file_size, info.CRC if has_checksums else None)


def verify(file: Path, stream: BinaryIO, entry: StoredBytes) -> None:
    """Read an entry of a zip file and compare its checksum; holds `CHUNK_BYTES` at a time.

    Raises:
        CheckpointError: it is damaged, or the file ends before it does.
    """
    if entry.crc32 is None:
        return
    stream.seek(entry.offset)
    checksum, left = 0, entry.num_bytes
    while left and (chunk := stream.read(min(left, CHUNK_BYTES))):
        checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
    if left or checksum != entry.crc32:
        raise damaged(file, "a part of it")


def damaged(file: Path, what: str) -> CheckpointError:
    """Word the error for bytes that are not those of their checksum."""
    return CheckpointError(
        f"{file} is damaged: {what} does not have the checksum that was stored with it, so at least one bit "
        "is not what it was when the file was written. Fetch the file again."
    )


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
