"""Settings of the check that `glmtune train` makes before it loads anything."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.settings import setting


@dataclass(frozen=True)
class PlanSettings:
    """What happens if the memory that a run will need is more than there is."""

    enforce: bool = setting(False, "refuse to start a run that cannot fit; false warns and starts it")
    hardware: str | None = setting(
        None, "memory to reckon with, such as 1x24GB or cpu:16GB; null: what this machine has"
    )
