"""One process at a time writes a folder: locks that the death of their holder releases.

Where a lock lies, and what holds it:

    RUN/.glmtune.lock       inside folders that stay (train, predict, eval, compare), see `lock_folder`
    .NAME.lock              beside folders that a rename replaces (quantize, export), see `lock_beside`

The operating system's lock on that file is what counts (flock; on Windows that of a byte): it goes with its
process, however that ends. The file names the holder, for the message to whoever comes second. (The package
`filelock` calls the same two, but empties the file; and where a system has neither, the mere presence of its
file is the lock, which stays when the holder dies.)

Network file systems may have no such locks, or locks that other machines do not see, without saying so. There
the holder also refreshes the file's time every `HEARTBEAT_SECONDS`, and one that has not been refreshed for
`LEASE_SECONDS` has no holder any more. On this machine nobody has to wait for that: a process that is no
longer there holds nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from glmtune.errors import ConfigError, GlmtuneError
from glmtune.storage.files import write_error
from glmtune.storage.holder import Holder, parse_holder, this_process
from glmtune.terminal import text as terminal

LOGGER = logging.getLogger(__name__)

FOLDER_LOCK = ".glmtune.lock"
LOCK_SUFFIX = ".lock"
PATIENCE_SECONDS = 3.0
"""How long a holder on this machine is waited for: one that was just killed needs a moment to end, as do the
workers of a launcher that was."""
ENDING_SECONDS = 60.0
"""How long one is waited for that is seen to be ending: the memory of a large run takes seconds to free."""
HEARTBEAT_SECONDS = 5.0
LEASE_SECONDS = 30.0
"""Six missed heartbeats: longer than the stalls of a network file system, short enough to be waited for."""
SETTLE_SECONDS = 1.0
"""Without any locks two starters both write their names; after so long the last one written holds it."""
POLL_SECONDS = 0.1
RECORD_BYTES = 2000
"""More than a record takes: what else lies under that name is not read whole."""
LOCAL_FILE_SYSTEMS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay", "ufs"}
    | {"apfs", "hfs", "ntfs", "refs", "fat32", "vfat", "exfat"}
)
"""Where the operating system's locks are known to hold against everybody. Others may be on a network."""


class Lock:
    """A lock that this process alone holds, until the context ends or the process does.

    A forked child does not hold it: workers of a data loader may outlive the process that made them.

    Attributes:
        path: the lock's own file.
    """

    def __init__(
        self,
        path: Path,
        *,
        guards: Path,
        made: bool = False,
        waits: bool = False,
        unwritable: Callable[[Path, OSError], GlmtuneError] = write_error,
    ) -> None:
        """Take the lock; a holder that is about to end is waited for.

        Args:
            path: the lock's own file.
            guards: the file or folder that it keeps others from, for the message.
            made: its folder was made for it, and goes with it if nothing else comes into it.
            waits: until its holder is done, however long that takes.
            unwritable: words the failure to make its file.

        Raises:
            ConfigError: another process holds it; which one is said.
            GlmtuneError: its file cannot be made.
        """
        self.path = path
        self._made, self._waits = made, waits
        self._signed = False
        self._handle: int | None = None
        self._is_exclusive = True  # whether the operating system keeps others out, here at least
        self._me = this_process()
        self._released = threading.Event()
        try:
            self._acquire(guards)
        except OSError as error:
            raise unwritable(guards, error) from None
        _HELD.add(self)
        if not (self._is_exclusive and _is_local(path)):
            threading.Thread(target=self._refresh, name="glmtune-lock", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let others have it; more than once is as good as once."""
        self._released.set()
        handle, self._handle = self._handle, None
        if handle is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
        # While it is held: whoever opened the file before this finds that it is gone once he has locked it.
        # That can be relied on where a name is seen to be gone at once, which caches of networks delay.
        removes = self._is_exclusive and _is_local(self.path) and _is_at(handle, self.path)
        with contextlib.suppress(OSError):
            if removes and sys.platform != "win32":
                self.path.unlink()
        os.close(handle)
        with contextlib.suppress(OSError):
            if removes and sys.platform == "win32":  # where no open file goes, nor one that is held again
                self.path.unlink()
            if self._made:
                self.path.parent.rmdir()  # an empty one only

    def _acquire(self, guards: Path) -> None:
        began = time.monotonic()
        first_seen: tuple[str, float] | None = None
        has_said = False
        while True:
            handle = _open(self.path)
            try:
                found = self._try(handle)
                if found is None:
                    self._handle = handle
                    return
            finally:
                if self._handle is None:
                    os.close(handle)
            if isinstance(found, _Gone):
                continue
            # Elsewhere: a heartbeat that is seen says that there is somebody, silence that there is not.
            beat = (found.token, found.refreshed)
            first_seen = first_seen or beat
            patience = found.patience
            waited = time.monotonic() - began
            if self._waits:
                has_said = has_said or self._say_wait(guards, found, waited)
            elif waited > patience or (not found.is_certain and beat != first_seen):
                raise ConfigError(
                    f"{guards} is being written by another process{f' ({found.who})' if found.who else ''}:"
                    " two runs cannot share an `output_dir`. Wait for it, end it, or choose another"
                    " `output_dir`."
                ).see("folder-in-use")
            if not self._waits and waited < POLL_SECONDS and patience > PATIENCE_SECONDS:
                LOGGER.warning(
                    "%s is held by %s. Waiting up to %.0f seconds to see whether it is still there.",
                    guards, found.who, patience,
                )  # fmt: skip
            time.sleep(POLL_SECONDS)

    def _say_wait(self, guards: Path, found: _Held, waited: float) -> bool:
        """Say what is waited for, once it takes longer than a moment."""
        if waited < PATIENCE_SECONDS:
            return False
        LOGGER.warning("Waiting for %s, which another process writes (%s).", guards, found.who or "unnamed")
        return True

    def _try(self, handle: int) -> _Held | _Gone | None:
        """Take the lock of an open file; None if that was possible."""
        try:
            _try_lock(handle)
        except (BlockingIOError, PermissionError):  # of Unix; of Windows
            return replace(_held(handle), is_certain=True)
        except OSError as error:
            if self._is_exclusive:
                LOGGER.warning(
                    "%s: files cannot be locked here (%s). A second process is noticed by the name and the"
                    " time in that file alone, which takes seconds.",
                    self.path, error.strerror or error,
                )  # fmt: skip
            self._is_exclusive = False
        if not _is_at(handle, self.path):
            return _Gone()
        if not (self._is_exclusive and _is_local(self.path)):
            found = _held(handle)
            if found.who is not None and self._excludes(handle, found.who):
                return replace(found, is_certain=found.who.is_here)
        self._signed = self._write_record(handle)
        if self._is_exclusive or not self._signed:
            return None
        time.sleep(SETTLE_SECONDS)
        last = _record_at(self.path)
        return None if last is None or last.token == self._me.token else _Held(last, last.token, 0.0, True)

    def _excludes(self, handle: int, holder: Holder) -> bool:
        """Tell whether a holder who is named, but whom the system's lock does not keep, is still there."""
        if holder.is_here:
            return not self._is_exclusive and holder.is_alive
        return time_of_file_system(self.path) - os.fstat(handle).st_mtime < LEASE_SECONDS

    def _write_record(self, handle: int) -> bool:
        """Name this process in the file, if it can be written: a full disk is reported by the command."""
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            text = json.dumps(asdict(self._me), ensure_ascii=False) + "\n"
            return os.write(handle, text.encode("utf-8", "backslashreplace")) > 0
        return False

    def _refresh(self) -> None:
        """Say every few seconds that the holder is there; end the process if another has taken its place."""
        while not self._released.wait(HEARTBEAT_SECONDS):
            holder = _record_at(self.path)
            if self._signed and holder is not None and holder.token != self._me.token:
                # Suspended for longer than the lease: what it would write now would mix with the other's.
                terminal.write_error(
                    f"glmtune: {self.path} was taken over by {holder} while this process stood still, so it"
                    " ends here. What it has written is kept.\n"
                )
                os._exit(1)
            handle = self._handle
            if handle is not None:
                with contextlib.suppress(OSError):
                    os.utime(handle if os.utime in os.supports_fd else self.path)


def lock_folder(folder: Path) -> Lock:
    """Make a folder that stays and lock it, before anything in it is looked at; a context manager.

    Args:
        folder: of a run.

    Raises:
        ConfigError: another process writes it; it is a file, or cannot be made or written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(
            f"`output_dir` is `{folder}`, which is a file, but it must be a folder. Name another one."
        ) from None
    except OSError as error:
        raise _unwritable(folder, error) from None
    return Lock(folder / FOLDER_LOCK, guards=folder, made=made, unwritable=_unwritable)


def lock_beside(folder: Path) -> Lock:
    """Lock a folder that a new one will replace, by a file beside it; a context manager.

    Args:
        folder: need not exist; the one above it is made.

    Raises:
        ConfigError: another process writes it, or the folder above cannot be made or written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    path = folder.with_name(f".{folder.name}{LOCK_SUFFIX}")
    return Lock(path, guards=folder, unwritable=_unwritable)


def time_of_file_system(path: Path) -> float:
    """Return what the clock says that stamps the files beside a path: a server's is not ours."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"`output_dir` is `{folder}`, but it cannot be written ({error.strerror or error}). Give a folder"
        " you may write to, with space left."
    )


@dataclass(frozen=True)
class _Held:
    """A lock that somebody else has.

    Attributes:
        who: as its file says.
        token: of that taking.
        refreshed: when it was refreshed.
        is_certain: it is there, as the operating system says; else its last sign may have been the last.
    """

    who: Holder | None
    token: str
    refreshed: float
    is_certain: bool = False

    @property
    def patience(self) -> float:
        """How long to wait for it before it is named to the user, in seconds."""
        if not self.is_certain:
            return LEASE_SECONDS + HEARTBEAT_SECONDS
        is_ending = self.who is not None and self.who.is_here and self.who.is_ending
        return ENDING_SECONDS if is_ending else PATIENCE_SECONDS


class _Gone:
    """The lock's file was removed by its last holder between opening and locking it."""


def _held(handle: int) -> _Held:
    try:
        who = parse_holder(os.pread(handle, RECORD_BYTES, 0) if hasattr(os, "pread") else _read(handle))
        return _Held(who, who.token if who else "", os.fstat(handle).st_mtime)
    except OSError:
        return _Held(None, "", 0.0)


def _read(handle: int) -> bytes:
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, RECORD_BYTES)


def _record_at(path: Path) -> Holder | None:
    """Read a record through a new handle: file systems on a network renew what they know on opening."""
    try:
        with path.open("rb") as file:
            return parse_holder(file.read(RECORD_BYTES))
    except OSError:
        return None


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT  # not emptied: it names another process
    try:
        return os.open(path, flags, 0o666)
    except PermissionError:
        # Another user's file in a shared folder can be locked all the same, only not signed.
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY)
        raise
    except FileNotFoundError:  # its last holder has taken the empty folder away
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _is_local(path: Path) -> bool:
    """Tell whether a path is known to lie on a disk of this machine."""
    return _file_system(str(path.parent.resolve())) in LOCAL_FILE_SYSTEMS


@cache
def _file_system(folder: str) -> str:
    try:
        mounts = psutil.disk_partitions(all=True)
    except (OSError, RuntimeError):
        return ""
    place = Path(folder)
    # The last of two mounts at one place hides the first.
    above = [mount for mount in mounts if place.is_relative_to(mount.mountpoint)]
    return (
        max(enumerate(above), key=lambda item: (len(item[1].mountpoint), item[0]))[1].fstype.lower()
        if above
        else ""
    )


# ---- the system's lock ----

try:
    import fcntl
except ImportError:  # Windows; a Python in WebAssembly has neither
    fcntl = None

if sys.platform == "win32":
    import msvcrt

    LOCKED_BYTE = 1 << 30
    """Windows' locks keep others from reading too, so a byte is locked that lies far behind the text."""

    def _try_lock(handle: int) -> None:
        os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
elif fcntl is not None:
    _flock, _alone = fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB

    def _try_lock(handle: int) -> None:
        _flock(handle, _alone)
else:

    def _try_lock(handle: int) -> None:
        # As a file system without locks answers: the record decides.
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


# A forked child shares the open file, and with it the lock, which would stay while any of both lives. Closing
# it there takes nothing from the parent. (Unlocking would.)
_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_in_child() -> None:
    for lock in list(_HELD):
        handle, lock._handle = lock._handle, None
        if handle is not None:
            os.close(handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
