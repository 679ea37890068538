"""Where a user's caches lie: what is made once, kept between runs, and may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder: ``$GLMTUNE_CACHE``, else ``glmtune`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        OSError: the user has no home folder, and no other place is named.
    """
    given, base = os.environ.get("GLMTUNE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if given:
            return Path(given).expanduser().absolute()
        return (Path(base) if base else Path.home() / ".cache").absolute() / "glmtune"
    except RuntimeError:  # neither HOME nor an entry of the user's in the system's list
        raise OSError("there is no home folder to keep them in (GLMTUNE_CACHE names another place)") from None
