"""Settings of a switch, which a prefix and a LoRA have alike."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.settings import check_range, setting

AUTO, NONE = "auto", "none"
"""General prompts: those of ``retain``, else the shipped ones; or none: the task's prompts alone."""


@dataclass(frozen=True, kw_only=True)
class SwitchSettings:
    """Whether a rule decides for each request; part of `PrefixSettings` and `LoraSettings`."""

    switch: bool = setting(
        False, "a rule decides for each request whether what is tuned applies; fitted before the first step"
    )
    switch_min_auroc: float = setting(
        0.99, "the switch is saved if it tells task prompts from others at least so well (held-out AUROC)"
    )
    switch_prompts: str = setting(
        AUTO,
        "prompts that are not the task's: auto (those of `retain`, else shipped), shipped, a file, or none: "
        "it learns from the task's alone",
    )

    def check_switch(self, path: str) -> None:
        """Check the range.

        Args:
            path: of the settings that these are part of, such as ``prefix``.

        Raises:
            ConfigError: a value is out of its range.
        """
        check_range(f"{path}.switch_min_auroc", self.switch_min_auroc, low=0, high=1)
