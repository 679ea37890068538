"""Download the official files of a benchmark once: checked, continued after a break, unpacked.

By hand on ``urllib``, although libraries download files. pooch checks and unpacks, but begins anew after a
break; with an HTTP client such as httpx only the call in ``_receive`` would change: the range, its tag, the
part file and the progress bar would stay. ``urllib`` is always there and honours the proxy variables that
the errors name.
"""

from __future__ import annotations

import hashlib
import http.client
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from evaluation.benchmarks.sources import Download, RemoteFile
from glmtune.errors import DataError
from glmtune.files import write_error

if TYPE_CHECKING:
    from rich.console import Console

CHUNK_BYTES = 1 << 16
TIMEOUT_SECONDS = 60.0
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
    return [folder / name for name in marker.read_text(encoding="utf-8").splitlines()]


def _inside(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or (parts.parts and ":" in parts.parts[0]):
        raise DataError(
            f"`{name}` would be written outside {folder}, so nothing of it is. Take the data from elsewhere."
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
        with _progress(path.name, console) as advance:
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
    part.replace(path)
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
        with part.open("ab" if continues else "wb") as file:
            while chunk := answer.read(CHUNK_BYTES):
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
                for member in archive.infolist():
                    if not member.is_dir():
                        _write_member(_inside(folder, member.filename), archive.read(member))
                        names.append(member.filename)
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None:
                        _write_member(_inside(folder, member.name), content.read())
                        names.append(member.name)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        path.unlink()
        raise DataError(
            f"{remote.url} is no whole archive ({error}); what came is deleted. Run the same command again."
        ) from None
    return names


def _write_member(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise write_error(path, error) from None


@contextmanager
def _progress(name: str, console: Console) -> Generator[Advance]:
    """Show a bar for one file, in bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=None)
        yield lambda more, total: bar.update(task, advance=more, total=total)
