"""Lets `python -m glmtune` stand for the `glmtune` command."""

from __future__ import annotations

import sys

from glmtune.cli import main

sys.exit(main())
