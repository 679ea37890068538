"""Where compiled libraries lie between runs, and why one found there may be loaded: it is code.

Loading a library runs it, with everything the user may do. So one is loaded only if nobody but the user (or
root) could have put it there, and only if it is byte for byte what was compiled::

    folders above   owned by the user or root, nobody else may write (/tmp may: it is sticky); else no library
    the folder      the same; one of the user's that was open to others is emptied of libraries and closed
    the file        a regular file of the user's, nobody else may write; else compiled again
    its content     has the checksum in its name: damaged, cut or empty ones are compiled again

The checksum covers what it was made of (sources, flags, compiler, processor) and the library, and stands in
the name, so that both appear in one rename, and two processes that compile at once do not mix theirs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from glmtune.storage.cache_place import cache_folder
from glmtune.storage.files import sync

LOGGER = logging.getLogger(__name__)
COMPILE_SECONDS = 300
"""It takes about ten on an idle machine; a limit, so that a compiler that hangs does not hang
`load_model`."""
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cached_library(command: Sequence[str], sources: Sequence[Path], made_of: bytes) -> Path:
    """Return a library from the cache, compiled first if no whole one is there.

    Args:
        command: compiler and flags.
        sources: what is compiled.
        made_of: a digest of all that decides what is in the library.

    Returns:
        Its file, safe to load.

    Raises:
        OSError: the cache cannot be made, or others may write to it.
        subprocess.SubprocessError: the compiler failed or took too long.
    """
    folder = _private_folder(cache_folder())
    stem = f"products-{made_of.hex()[:20]}-"
    for file in sorted(folder.glob(f"{stem}*.so")):
        if file.name == _name(stem, made_of, file) and _is_own(file):
            return file
        LOGGER.warning("%s is damaged or not yours alone; it is not loaded but compiled again.", file)
        file.unlink()
    LOGGER.info("Compiling the native kernels once, into %s", folder)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / "library.so"
        # A list, no shell: no word of it is read as a command. The compiler's own temporary files go here as
        # well, as there may be no other folder for them.
        subprocess.run(
            [*command, *map(str, sources), "-o", str(made)],
            check=True,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMPILE_SECONDS,
            env={**os.environ, "TMPDIR": place},
        )
        made.chmod(0o600)
        sync(made)
        file = folder / _name(stem, made_of, made)
        made.replace(file)  # at once: another process finds all of it or nothing
        sync(folder)
    return file


def _name(stem: str, made_of: bytes, file: Path) -> str:
    """Return the name of a library with this content."""
    return f"{stem}{hashlib.sha256(made_of + file.read_bytes()).hexdigest()[:32]}.so"


def _private_folder(folder: Path) -> Path:
    """Make a folder that only the user may enter; refuse one that others could have filled.

    Raises:
        OSError: it cannot be made, or it or a folder above it is open to others.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = folder.resolve()  # links are followed first: what they lead to is checked
    for place in (folder, *folder.parents):
        found = place.stat()
        # In a sticky folder nobody can rename or remove what is another's.
        is_closed = not found.st_mode & OTHERS_MAY_WRITE or (place != folder and found.st_mode & stat.S_ISVTX)
        is_ours_to_close = place == folder and found.st_uid == os.geteuid()
        if found.st_uid not in (os.geteuid(), 0) or not (is_closed or is_ours_to_close):
            raise OSError(
                f"others may write to {place}, and what lies below it is code. Take the right from them "
                "(`chmod go-w`), or name a folder of your own in GLMTUNE_CACHE"
            )
    found = folder.stat()
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
        if found.st_mode & OTHERS_MAY_WRITE:
            for file in folder.glob("products-*.so"):  # whoever put them there
                file.unlink()
    return folder


def _is_own(file: Path) -> bool:
    found = file.lstat()
    is_file = stat.S_ISREG(found.st_mode)
    return is_file and found.st_uid in (os.geteuid(), 0) and not found.st_mode & OTHERS_MAY_WRITE
