"""Packed data files, read within bounds: ``rows.jsonl.gz``, and the members of ``rows.zip``.

A few kilobytes may unpack to any number of bytes, so reading stops where no text of people would be. Nothing
is written to disk, so the names in an archive decide nothing but what a member is called in messages.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from glmtune.errors import DataError

MIN_BYTES_READ = 1 << 28
MOST_UNPACKED_TIMES = 100
"""Text of people is packed to a fifth at best, rows that repeat each other to a fiftieth."""
MAX_MEMBERS = 10_000
ZIP, GZIP = ".zip", ".gz"

_CHUNK_BYTES = 1 << 20
_OTHER_KINDS = (
    (b"\x1f\x8b", "gzip", "gunzip FILE"),
    (b"BZh", "bzip2", "bunzip2 FILE"),
    (b"\xfd7zXZ\x00", "xz", "unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unzstd FILE"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "7z x FILE"),
    (b"Rar!", "RAR", "unrar x FILE"),
)


def data_suffix(path: Path) -> str:
    """Return the extension that tells a file's form, in lower case: ``.csv`` for ``rows.CSV.gz``."""
    return (Path(path.stem) if path.suffix.lower() == GZIP else path).suffix.lower()


def archive_of(path: Path) -> Path | None:
    """Return the archive that ``rows.zip/train.jsonl`` is a member of, None for other paths."""
    return next(
        (parent for parent in path.parents if parent.suffix.lower() == ZIP and parent.is_file()), None
    )


def members(archive: Path) -> list[str]:
    """List the files of an archive by name, those left out that systems put into it for themselves.

    Args:
        archive: a zip file.

    Raises:
        DataError: it is no zip file, or holds too many files.
    """
    with _opened(archive) as opened:
        names = [info.filename for info in opened.infolist() if not info.is_dir()]
    if len(names) > MAX_MEMBERS:
        raise DataError(
            f"it holds {len(names)} files, more than {MAX_MEMBERS}, the most that are read. Join them.",
            path=archive,
        )
    return sorted(name for name in names if not any(part[:1] in "._" for part in name.split("/")))


@contextmanager
def open_packed(path: Path) -> Generator[BinaryIO]:
    """Open a data file to be read from its beginning, unpacked if its content says that it is packed.

    Args:
        path: a file, or a member of an archive as `archive_of` understands it.

    Raises:
        DataError: the archive is damaged, encrypted, of another kind, lacks the member, or (while reading)
            unpacks to more than its size allows.
        OSError: the file cannot be read.
    """
    archive = archive_of(path)
    if archive is not None:
        with _opened(archive) as opened, _member(opened, archive, path) as member:
            yield _buffered(_Unpacked(member, path, archive), path)
        return
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if head.startswith(b"\x1f\x8b"):
            yield _buffered(_Unpacked(gzip.GzipFile(fileobj=file), path, path), path)
            return
        _refuse_other_kinds(head, path)
        yield file


def read_packed(path: Path) -> bytes:
    """Return the bytes of a data file, unpacked if its content says that it is packed.

    Args:
        path: a file, or a member of an archive as `archive_of` understands it.

    Raises:
        DataError: see `open_packed`; so is OSError.
    """
    with open_packed(path) as file:
        return file.read()


def _member(opened: zipfile.ZipFile, archive: Path, path: Path) -> IO[bytes]:
    try:
        return opened.open(path.relative_to(archive).as_posix())
    except KeyError:
        raise DataError(
            f"{archive} holds no such file. It holds: {_some(members(archive))}.", path=path
        ) from None
    except (RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:  # encrypted, or a rare method
        raise DataError(f"it cannot be unpacked: {error}. Unpack the archive yourself.", path=path) from None


def _opened(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DataError(f"no valid zip file: {error}. Copy or download it again.", path=archive) from None
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror or error}.", path=archive) from None


class _Unpacked(io.RawIOBase):
    """Unpacked bytes up to the bound: what an archive says of its own sizes is not asked."""

    def __init__(self, packed: IO[bytes] | gzip.GzipFile, path: Path, archive: Path) -> None:
        self._packed, self._path, self._archive = packed, path, archive
        self._size = archive.stat().st_size
        self._most = max(MIN_BYTES_READ, MOST_UNPACKED_TIMES * self._size)
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            chunk = self._packed.read(len(view))
        # A damaged stream ends in one of these, by the method that packed it.
        except (
            EOFError,
            zlib.error,
            lzma.LZMAError,
            zipfile.BadZipFile,
            gzip.BadGzipFile,
            RuntimeError,
        ) as error:
            raise DataError(f"it is damaged: {error}. Copy or download it again.", path=self._path) from None
        self._num_bytes += len(chunk)
        if self._num_bytes > self._most:
            raise DataError(
                f"the {self._size} bytes of {self._archive.name} unpack to more than {self._most} bytes, the"
                " most that is read of a file of this size. Unpack it yourself, and give the file.",
                path=self._path,
            )
        view[: len(chunk)] = chunk
        return len(chunk)


def _buffered(unpacked: _Unpacked, path: Path) -> BinaryIO:
    """Buffer what is unpacked, and refuse what is packed once more or no text.

    In the bounds of what is packed twice those of the first packing would be multiplied.
    """
    buffered = io.BufferedReader(unpacked, _CHUNK_BYTES)
    _check_text(buffered.peek(512), path)
    return buffered


def _check_text(head: bytes, path: Path) -> None:
    _refuse_other_kinds(head[:8], path)
    # tar has its mark behind the name, size and owner of the first file.
    if head[257:262] == b"ustar":
        raise DataError(
            f"this is a tar archive, of which no single file is meant. Unpack it (`tar xf {path.name}`), and"
            " name a file or the folder.",
            path=path,
        )


def _refuse_other_kinds(head: bytes, path: Path) -> None:
    if head.startswith(b"PK\x03\x04"):
        way = "save the sheet as CSV" if path.suffix.lower() in (".xlsx", ".xlsm", ".ods") else "name it .zip"
        raise DataError(f"this is a zip archive by its content, not text: {way}.", path=path)
    if head.startswith(b"PAR1"):
        raise DataError(
            "this is a Parquet file by its content: unpack it where it is packed, and name it .parquet.",
            path=path,
        )
    for magic, kind, command in _OTHER_KINDS:
        if head.startswith(magic):
            raise DataError(
                f"this is packed by {kind}; only one gzip or zip is undone. Unpack it: `{command}`.",
                path=path,
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"
