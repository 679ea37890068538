"""Settings of a prefix: how long it is, how it is parameterised and where it starts."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.settings import check_choice, check_range, setting
from glmtune.switch.settings import SwitchSettings

INITS = ("random", "zero", "text")


@dataclass(frozen=True)
class PrefixSettings(SwitchSettings):
    """What a new prefix encoder looks like; the names are those of the official GLM scripts."""

    pre_seq_len: int = setting(128, "length of the prefix, in positions per layer")
    prefix_projection: bool = setting(False, "re-parameterise the prefix through a two-layer MLP")
    init: str = setting("random", "start of the prefix: random (official, N(0, 1)), zero, or text")
    init_text: str | None = setting(None, "instruction whose keys and values start the prefix (init=text)")
    gate: bool = setting(
        False, "the prefix has a softmax of its own, and a gate per head that opens from zero (LLaMA-Adapter)"
    )
    dropout: float = setting(0.1, "fraction of prefix keys and values dropped while training (official: 0.1)")

    def __post_init__(self) -> None:
        """Check every field, and `init` against the fields it depends on.

        Raises:
            ConfigError: a value is out of range, or two settings contradict each other.
        """
        check_range("prefix.pre_seq_len", self.pre_seq_len, low=1)
        check_choice("prefix.init", self.init, INITS)
        self.check_switch("prefix")
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"`prefix.dropout` is {self.dropout}, but it must be at least 0 and below 1. "
                "The official value is 0.1; use 0 to switch it off."
            )
        has_text = self.init_text is not None and self.init_text.strip() != ""
        if self.init == "text" and not has_text:
            raise ConfigError(
                "`prefix.init` is `text`, which needs an instruction, but `prefix.init_text` is "
                f"{self.init_text!r}. "
                "Write one, such as `prefix.init_text='Write an advertisement for these attributes.'`, "
                "or use `prefix.init=random`."
            )
        if self.init != "text" and self.init_text is not None:
            raise ConfigError(
                f"`prefix.init_text` is {self.init_text!r}, but `prefix.init` is `{self.init}`, "
                "which ignores it. "
                "Use `prefix.init=text`, or leave `prefix.init_text` out."
            )
        if self.init == "zero" and self.gate:
            raise ConfigError(
                "`prefix.init` is `zero` and `prefix.gate` is true, but with values and gates both at zero "
                "neither gets a gradient, and nothing would ever be learnt. Use `prefix.init=random` (with a "
                "gate the start is the base, exactly), or `prefix.gate=false`."
            )
        if self.init == "text" and self.prefix_projection:
            raise ConfigError(
                "`prefix.init` is `text` and `prefix.prefix_projection` is True, but the keys and values of "
                "a text can only be written into a prefix without projection. "
                "Use `prefix.prefix_projection=false`, or `prefix.init=random`."
            )
