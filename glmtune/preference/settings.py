"""Settings of preference tuning: which loss, how strongly it is held to the reference, and what that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.settings import check_choice, check_range, setting

LOSSES = ("dpo", "ipo", "orpo", "kto")
REFERENCES = ("base", "start")
BASE, START = REFERENCES


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """How answers are learnt from that were compared or judged."""

    loss: str = setting(
        "dpo", "dpo, ipo or orpo (of pairs), or kto (of judged answers; a pair is two of them)"
    )
    beta: float = setting(
        0.1, "how strongly the reference holds: a larger one stays nearer; orpo: weight of the odds ratio"
    )
    reference: str | None = setting(
        None,
        "what answers are measured against: base (the tuned part off), start (the model as the run begins);"
        " null: base, but start where all weights are tuned or something tuned is tuned further",
    )
    label_smoothing: float = setting(0.0, "dpo: share of pairs that are reckoned to be the wrong way round")
    sft_weight: float = setting(
        0.0, "what the usual loss of the better answers counts beside it (orpo always adds it once)"
    )
    desirable_weight: float = setting(1.0, "kto: what a desirable answer counts")
    undesirable_weight: float = setting(1.0, "kto: what an undesirable answer counts")

    def __post_init__(self) -> None:
        """Check the ranges, and that the loss reads what is set.

        Raises:
            ConfigError: a value is out of its range, or nothing would read it.
        """
        check_choice("preference.loss", self.loss, LOSSES)
        if self.reference is not None:
            check_choice("preference.reference", self.reference, REFERENCES)
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"`preference.beta` is {self.beta}, but it must be above 0, such as 0.1.")
        for name in ("sft_weight", "desirable_weight", "undesirable_weight"):
            check_range(f"preference.{name}", getattr(self, name), low=0)
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"`preference.label_smoothing` is {self.label_smoothing}, but it must be from 0 to below 0.5:"
                " at a half nothing is preferred any more."
            )
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ConfigError(
                "`preference.desirable_weight` and `preference.undesirable_weight` are both 0, but then"
                " nothing is learnt. Leave one of them at 1."
            )
        self._check_read()

    def _check_read(self) -> None:
        for name, default, losses in (
            ("label_smoothing", 0.0, ("dpo",)),
            ("desirable_weight", 1.0, ("kto",)),
            ("undesirable_weight", 1.0, ("kto",)),
            ("sft_weight", 0.0, ("dpo", "ipo")),
            ("reference", None, ("dpo", "ipo", "kto")),
        ):
            value = getattr(self, name)
            if value != default and self.loss not in losses:
                raise ConfigError(
                    f"`preference.{name}` is {value}, but `preference.loss` is `{self.loss}`, which does not"
                    f" read it (of {', '.join(losses)}). Leave it out."
                )

    @property
    def has_reference(self) -> bool:
        """Whether answers are measured against a reference; ORPO has none."""
        return self.loss != "orpo"

    @property
    def takes_pairs(self) -> bool:
        """Whether an example is two answers to one prompt."""
        return self.loss != "kto"

    @property
    def nll_weight(self) -> float:
        """What the mean loss per token of the better answers counts."""
        return 1.0 if self.loss == "orpo" else self.sft_weight

    def reference_of(self, *, is_base: bool) -> str | None:
        """Return ``base`` or ``start``; None where there is no reference.

        Args:
            is_base: whether the run begins with the base, which stays at hand: a new prefix or LoRA over it.
        """
        if not self.has_reference:
            return None
        return self.reference or (BASE if is_base else START)
