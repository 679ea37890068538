"""Download the official files of a benchmark once: checked, continued after a break, unpacked.

By hand on ``urllib``, although libraries download files. pooch checks and unpacks, but begins anew after a
break; with an HTTP client such as httpx only the call in ``_receive`` would change: the range, its tag, the
part file and the progress bar would stay. ``urllib`` is always there and honours the proxy variables that
the errors name.
"""

from __future__ import annotations

import hashlib
import http.client
import lzma
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from evaluation.benchmarks.sources import Download, RemoteFile
from glmtune.errors import DataError
from glmtune.storage.files import sync, write_error
from glmtune.storage.renames import replace

if TYPE_CHECKING:
    from glmtune.terminal.console import Console

CHUNK_BYTES = 1 << 16
TIMEOUT_SECONDS = 60.0
MAX_DOWNLOAD_BYTES = 4 << 30
MAX_UNPACKED_BYTES = 2 << 30
"""Of all files of an archive; the largest here, MMLU's, has 0.2 GB."""
MAX_MEMBERS = 100_000
ARCHIVE_ERRORS = (
    *(tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError),
    *(NotImplementedError, RuntimeError),  # packed in a way that Python does not know, or encrypted
)
Advance = Callable[[int, int | None], None]


def fetch(download: Download, folder: Path, console: Console) -> list[Path]:
    """Download what is not there yet into a folder; the licence is shown first.

    Args:
        download: what to fetch.
        folder: made if it is not there.
        console: shows licence and progress.

    Returns:
        The files; of an archive its members.

    Raises:
        DataError: a server does not answer, a file is not the expected one, or an archive is damaged.
        GlmtuneError: a file cannot be written.
    """
    lines = (
        f"{download.name} from {download.home}",
        f"licence: {download.licence}",
        *([download.notes] if download.notes else []),
        f"into {folder}",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    found: list[Path] = []
    for remote in download.files:
        path = _inside(folder, remote.path)
        marker = path.with_name(path.name + ".unpacked")
        members = _members(marker, folder)
        if members and all(member.is_file() for member in members):
            found += members
            continue
        if not (path.is_file() and _is_right(path, remote)):
            _get(remote, path, console)
        if remote.unpack:
            names = _unpack(path, folder, remote)
            marker.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            path.unlink()
            found += [folder / name for name in names]
        else:
            found.append(path)
    return found


def _members(marker: Path, folder: Path) -> list[Path]:
    """Return what an archive unpacked earlier held."""
    if not marker.is_file():
        return []
    # Not `splitlines`: a name may hold U+2028 and the like.
    return [folder / name for name in marker.read_text(encoding="utf-8").split("\n") if name]


def _inside(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or (parts.parts and ":" in parts.parts[0]):
        raise DataError(
            f"`{name}` would be written outside {folder}, so nothing of it is. Take the data from elsewhere."
        )
    if not parts.parts or not name.isprintable():
        raise DataError(
            f"{name!r} is no name of a file, so nothing is written. Take the data from elsewhere."
        )
    return folder.joinpath(*parts.parts)


def _is_right(path: Path, remote: RemoteFile) -> bool:
    return not remote.sha256 or _sha256(path) == remote.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _get(remote: RemoteFile, path: Path, console: Console) -> None:
    """Download one file under another name, check it, and give it its name."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _progress(path.name) as advance:
            _receive(remote, part, advance)
    except urllib.error.HTTPError as error:
        raise _unreachable(remote, path, f"HTTP {error.code} {error.reason}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise _unreachable(remote, path, reason) from None
    except OSError as error:
        raise write_error(part, error) from None
    if not _is_right(part, remote):
        digest = _sha256(part)
        part.unlink()
        raise DataError(
            f"{remote.url} has the SHA-256 {digest}, but the official file has {remote.sha256}; what came is"
            f" deleted. Run the same command again; if it stays so, put the file there by hand as {path}."
        )
    sync(part)
    replace(part, path)
    sync(path.parent)
    _tag_file(part).unlink(missing_ok=True)


def _receive(remote: RemoteFile, part: Path, advance: Advance) -> None:
    """Add to a part what it still lacks; begin anew where the server cannot continue or has another file."""
    start = part.stat().st_size if part.is_file() else 0
    tag = _tag_file(part).read_text(encoding="utf-8") if start and _tag_file(part).is_file() else ""
    # "identity": a compressed answer would make the length and the range count other bytes than the file's.
    headers = {"User-Agent": "glmtune", "Accept-Encoding": "identity"}
    # Without a tag or a checksum nobody would notice that the halves are of two releases: then all anew.
    if start and (tag or remote.sha256):
        headers["Range"] = f"bytes={start}-"
        if tag:
            headers["If-Range"] = tag
    request = urllib.request.Request(remote.url, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the range begins behind the end: the part has all bytes, or too many
            raise
        if remote.sha256 and _is_right(part, remote):
            return  # it was whole already
        part.unlink()
        return _receive(remote, part, advance)
    with answer:
        continues = answer.status == 206  # 200: the server knows no ranges, or the file has changed since
        _tag_file(part).write_text(answer.headers.get("ETag") or "", encoding="utf-8")
        length = answer.headers.get("Content-Length")
        begin = start if continues else 0
        total = begin + int(length) if length else None
        advance(begin, total)
        received = begin
        with part.open("ab" if continues else "wb") as file:
            while chunk := answer.read(CHUNK_BYTES):
                received += len(chunk)
                if received > MAX_DOWNLOAD_BYTES:
                    raise DataError(
                        f"{remote.url} sends more than {MAX_DOWNLOAD_BYTES} bytes, which no benchmark has."
                        f" Download it elsewhere and put it there as {part.with_suffix('')}."
                    )
                file.write(chunk)
                advance(len(chunk), total)
    # A closed connection ends ``read`` like the end of the file does.
    if total is not None and part.stat().st_size < total:
        raise http.client.IncompleteRead(b"", total - part.stat().st_size)


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _unreachable(remote: RemoteFile, path: Path, reason: str) -> DataError:
    return DataError(
        f"{remote.url} could not be downloaded ({reason}). What came so far is kept: run the same command"
        " again and it goes on. Behind a proxy set HTTPS_PROXY; or download it elsewhere and put it there as"
        f" {path}."
    )


def _unpack(path: Path, folder: Path, remote: RemoteFile) -> list[str]:
    """Unpack an archive into a folder; returns the names of its files, links and devices left out."""
    names: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                # What a header says is what is unpacked: zipfile stops there, and then compares the checksum.
                _check_size(remote, len(members), sum(member.file_size for member in members))
                for member in members:
                    with archive.open(member) as content:
                        _write_member(_inside(folder, member.filename), content)
                    names.append(member.filename)
        else:
            with tarfile.open(path) as archive:
                num_bytes = 0
                for member in archive:  # before the next one is looked for, which would unpack this one
                    num_bytes += member.size
                    _check_size(remote, len(names), num_bytes)
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None:
                        _write_member(_inside(folder, member.name), content)
                        names.append(member.name)
    except ARCHIVE_ERRORS as error:
        if getattr(error, "errno", None) is not None:  # the disk's fault, not the archive's
            raise DataError(f"the archive cannot be read: {error}. Check the disk.", path=path) from None
        path.unlink()
        raise DataError(
            f"{remote.url} is no whole archive ({error}); what came is deleted. Run the same command again."
        ) from None
    return names


def _check_size(remote: RemoteFile, num_members: int, num_bytes: int) -> None:
    if num_bytes > MAX_UNPACKED_BYTES or num_members > MAX_MEMBERS:
        raise DataError(
            f"{remote.url} unpacks to more than {MAX_UNPACKED_BYTES} bytes or {MAX_MEMBERS} files, which no"
            " benchmark has. It is kept as it came; take the data from elsewhere."
        )


def _write_member(path: Path, content: IO[bytes]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
    except OSError as error:
        raise write_error(path, error) from None
    with file:
        while chunk := content.read(CHUNK_BYTES):
            try:
                file.write(chunk)
            except OSError as error:
                raise write_error(path, error) from None


@contextmanager
def _progress(name: str) -> Generator[Advance]:
    """Show how much of one file is there, in bytes."""
    from glmtune.terminal.progress import Meter

    with Meter(name, unit="bytes") as meter:
        yield lambda more, total: meter.update(meter.done + more, total=total)
