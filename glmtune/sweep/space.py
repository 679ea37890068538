"""What a sweep goes over: settings with several values, and the points that one value of each makes."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from glmtune.errors import ConfigError

MAX_NAME = 120
"""Characters of a point's name; file systems take 255 bytes, and the seed is added."""
DIGITS = 4
"""Significant digits of a number drawn from an interval: more decide nothing, and nobody can read them."""


@dataclass(frozen=True)
class Choices:
    """A setting with a list of values.

    Attributes:
        key: as it is typed, such as ``trainer.learning_rate`` or ``+recipe``.
        values: as they are typed behind it, each once.
    """

    key: str
    values: tuple[str, ...]

    @property
    def first(self) -> str:
        """The value that stands for all where one is asked for."""
        return self.values[0]

    @property
    def ends(self) -> tuple[str, ...]:
        """The values that are checked before anything starts: all."""
        return self.values


@dataclass(frozen=True)
class Interval:
    """A setting with an interval of numbers, both ends in it.

    Attributes:
        key: see `Choices`.
        low: lower end.
        high: upper end, above it.
        is_int: whole numbers only.
        is_log: equal ratios, not equal differences, are equally likely.
    """

    key: str
    low: float
    high: float
    is_int: bool = False
    is_log: bool = False

    @property
    def first(self) -> str:
        """The value that stands for all where one is asked for."""
        return self.written(self.low)

    @property
    def ends(self) -> tuple[str, ...]:
        """The values that are checked before anything starts."""
        return self.written(self.low), self.written(self.high)

    def written(self, value: float) -> str:
        """Write a value as it is typed, rounded where it is no whole number.

        >>> Interval("lr", 1e-4, 0.1).written(0.0123456789)
        '0.01235'
        """
        if self.is_int:
            return str(round(value))
        return repr(min(max(float(f"{value:.{DIGITS}g}"), float(self.low)), float(self.high)))


Axis = Choices | Interval


@dataclass(frozen=True)
class Point:
    """One value of every setting of a sweep.

    Attributes:
        values: key and value of each, as they are typed, in the order of the axes.
    """

    values: tuple[tuple[str, str], ...]

    @property
    def words(self) -> list[str]:
        """The point as words of a command line."""
        return [f"{key}={value}" for key, value in self.values]

    @property
    def name(self) -> str:
        """The point as part of a folder's name: last parts of settings where they tell enough.

        >>> Point((("trainer.learning_rate", "0.001"), ("+recipe", "lora"))).name
        'learning_rate=0.001_recipe=lora'
        """
        shorts = short_names([key for key, _ in self.values])
        text = "_".join(f"{short}={value}" for short, (_, value) in zip(shorts, self.values, strict=True))
        plain = re.sub(r"[^\w.=+-]+", "-", text, flags=re.ASCII).strip("-")
        if plain == text and len(text) <= MAX_NAME:
            return text
        # Two texts may look alike once their characters are replaced.
        return f"{plain[:MAX_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def shown(self) -> str:
        """The point in a line of text."""
        return " ".join(self.words)


def short_names(keys: Sequence[str]) -> list[str]:
    """Return the last parts of settings' names; the whole name where two end alike.

    >>> short_names(["trainer.learning_rate", "+recipe"])
    ['learning_rate', 'recipe']
    >>> short_names(["lora.rank", "other.rank"])
    ['lora.rank', 'other.rank']
    """
    whole = [key.lstrip("+~") for key in keys]
    lasts = [key.rpartition(".")[2] for key in whole]
    return [last if lasts.count(last) == 1 else name for last, name in zip(lasts, whole, strict=True)]


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Return every point, the last setting changing first, as Hydra orders them.

    Args:
        axes: with values that can be listed.

    Raises:
        ConfigError: an interval, which has no list of values.
    """
    for axis in axes:
        if isinstance(axis, Interval):
            raise ConfigError(
                f"`{axis.key}` is an interval from {axis.low:g} to {axis.high:g}, but `sweep.search` is"
                f" `grid`, which trains every value. Name some, `{axis.key}={axis.low:g},{axis.high:g}`, or"
                " use `sweep.search=optuna`."
            )
    return _every(axes)


def _every(axes: Sequence[Axis]) -> list[Point]:
    """Return the points of all values that can be named."""
    values = ([(axis.key, value) for value in axis.ends] for axis in axes)
    return [Point(chosen) for chosen in itertools.product(*values)]


def corners(axes: Sequence[Axis], *, limit: int) -> list[Point]:
    """Return points with every value that can be named: all of a grid if they are few, else each in turn.

    What one setting does not allow shows there; what only two of them together do not allow may show later.

    Args:
        axes: of any kind; of an interval its ends are taken.
        limit: most points of a grid.
    """
    if math.prod(len(axis.ends) for axis in axes) <= limit:
        return _every(axes)
    base = [(axis.key, axis.first) for axis in axes]
    found = {Point(tuple(base)): None}
    for place, axis in enumerate(axes):
        for value in axis.ends:
            found[Point((*base[:place], (axis.key, value), *base[place + 1 :]))] = None
    return list(found)
