"""Every error a user can cause, each saying what is wrong, the rule, the value and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self


class GlmtuneError(Exception):
    """Base of all errors raised on purpose; the command line prints them without a stack trace.

    Attributes:
        exit_code: of a command that ends with this error.
        anchor: of the entry in ``docs/trouble.md`` that says more, for what users meet most; else None.
    """

    exit_code: int = 1
    anchor: str | None = None

    def see(self, anchor: str) -> Self:
        """Name the entry of ``docs/trouble.md`` that says more: ``raise ConfigError(...).see("layout")``."""
        self.anchor = anchor
        return self


class ConfigError(GlmtuneError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""

    exit_code = 2


class UnknownSettingError(ConfigError):
    """A setting that a command does not have.

    Attributes:
        key: as it was given.
        command: name of the command.
        near: the setting that may be meant; None: nothing is near.
        around: what is said before and after.
    """

    def __init__(
        self,
        key: str,
        command: str,
        near: str | None = None,
        *,
        around: tuple[str, str] = ("", ""),
        others: Sequence[str] = (),
    ) -> None:
        """Word the message.

        Args:
            key: see the class.
            command: see the class.
            near: see the class.
            around: see the class.
            others: commands that have such a setting; named where nothing is near.
        """
        self.key, self.command, self.near, self.around = key, command, near, around
        guess = f" Did you mean `{near}`?" if near else ""
        if others and not near:
            named = [f"`glmtune {name}`" for name in others[:3]] + ["others"] * (len(others) > 3)
            *some, last = named
            guess = (
                f" It is a setting of {', '.join(some)} or {last}."
                if some
                else f" It is a setting of {last}."
            )
        text = f"`{key}` is no setting of `glmtune {command}`.{guess} See `glmtune {command} --help`."
        super().__init__(text.join(around))

    def of_commands(self, others: Sequence[str]) -> UnknownSettingError:
        """Return the error that also names the commands which have such a setting."""
        return UnknownSettingError(self.key, self.command, self.near, around=self.around, others=others)

    def within(self, before: str, after: str) -> UnknownSettingError:
        """Return the error that says something before and after."""
        return UnknownSettingError(self.key, self.command, self.near, around=(before, after))


class DataError(GlmtuneError):
    """A data file or one of its rows cannot be used."""

    def __init__(self, message: str, *, path: str | Path | None = None, line: int | None = None) -> None:
        """Prefix the message with the place of the bad row.

        Args:
            message: what is wrong and what to do.
            path: the file, if one is known.
            line: 1-based line (text files) or row (tables) in it.
        """
        self.path = Path(path) if path is not None else None
        self.line = line
        place = "" if path is None else f"{path}: " if line is None else f"{path}, line {line}: "
        super().__init__(place + message)


class CheckpointError(GlmtuneError):
    """A checkpoint is missing, incomplete, of another architecture, or does not fit its base model."""


class ShapeError(GlmtuneError):
    """A tensor has not the shape that a rule demands."""


class TrainingError(GlmtuneError):
    """A run had to stop (non-finite loss, no space left, ...); the last good checkpoint is intact."""


class StartAnewError(TrainingError):
    """A run went back to a checkpoint, and its processes must be started anew to go on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed


class MissingExtraError(GlmtuneError):
    """An optional package is needed for what was asked."""

    def __init__(self, what: str, *, extra: str) -> None:
        """Name the extra to install.

        Args:
            what: what was asked for.
            extra: the extra of glmtune that brings the package.
        """
        super().__init__(
            f"{what} needs an optional package. Install it with `pip install 'glmtune[{extra}]'`."
        )


def unknown_name(what: str, value: object, valid: Iterable[str]) -> str:
    """Word the message for a name that is not in a closed set, nearest valid names first.

    Args:
        what: what the name stands for, such as "`prefix.init`" or "Preset".
        value: the name received.
        valid: the names that exist.

    Returns:
        One sentence naming the value and listing the valid names.

    >>> unknown_name("`prefix.init`", "randm", ["random", "zero", "text"])
    '`prefix.init` is `randm`, which does not exist. Did you mean `random`? Valid: random, zero, text.'
    """
    names = list(valid)
    near = difflib.get_close_matches(str(value), names, n=len(names), cutoff=0.6)
    ordered = near + [name for name in names if name not in near]
    guess = f" Did you mean `{near[0]}`?" if near else ""
    return f"{what} is `{value}`, which does not exist.{guess} Valid: {', '.join(ordered)}."
