"""Lets `python -m glmtune` stand for the `glmtune` command, whatever files lie in the user's folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _without_users_folder() -> None:
    """Keep modules of the user's folder from standing in for ours, or for those of libraries.

    `python -m` searches the working folder first: a user's own `datasets.py` or `recipes.py` would be
    imported instead of the real one. The `glmtune` script never searches there, so nothing is lost.
    """
    started_by_name = bool(__package__)
    if started_by_name and not sys.flags.safe_path and sys.path[0] in ("", str(Path.cwd())):
        if not os.path.samefile(Path.cwd(), ROOT):  # there the package itself may come from nowhere else
            del sys.path[0]
    elif not started_by_name and str(ROOT) not in sys.path:
        # The launcher names this file, for a checkout that is not installed. Last, as site-packages may
        # hold backports that must not stand before the standard library.
        sys.path.append(str(ROOT))


if __name__ == "__main__":  # a data loader's worker, where processes are spawned, reads this file again
    _without_users_folder()
    from glmtune.cli import main

    sys.exit(main())
