"""Points that Optuna chooses by what came out before: TPE, asked and told one point after the other.

The study lies in the sweep's folder as a journal of Optuna's, so a sweep that was killed goes on with all
that it has learnt. The sampler is made anew for every point from the sweep's seed and the point's number:
what it draws does not depend on how often the sweep was interrupted.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtune.errors import DataError, MissingExtraError
from glmtune.storage.files import write_error
from glmtune.sweep.space import Axis, Choices, Point

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STUDY_FILE = "optuna.jsonl"
STUDY = "sweep"


def require_optuna() -> None:
    """Refuse what needs Optuna where it is not installed.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("optuna") is None:
        raise MissingExtraError("`sweep.search=optuna`", extra="sweeps")


class OptunaSearch:
    """A study over the settings of a sweep."""

    def __init__(self, file: Path, axes: Sequence[Axis], *, larger_is_better: bool, seed: int) -> None:
        """Begin a study, or go on with the one in the file.

        Args:
            file: of the study; nobody else writes it (the sweep's folder is locked).
            axes: the settings.
            larger_is_better: which way is up.
            seed: of the samplers.

        Raises:
            MissingExtraError: Optuna is not installed.
            DataError: the file is damaged.
        """
        require_optuna()
        import optuna

        self._axes, self._seed = axes, seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        _drop_torn_line(file)
        try:
            self._study: Study = optuna.create_study(
                study_name=STUDY,
                storage=_storage(file),
                direction="maximize" if larger_is_better else "minimize",
                load_if_exists=True,
            )
        except OSError as error:
            raise write_error(file, error) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"it is no study of Optuna ({error}). Name another `output_dir`.", path=file
            ) from None

    def points(self, total: int, value_of: Callable[[Point], float | None]) -> Iterator[Point]:
        """Yield the points of the study, earlier ones first; each is told when the next is asked for.

        Args:
            total: how many in all.
            value_of: tells what a point scored once it has been yielded; None: it failed.
        """
        from optuna.trial import TrialState

        number = 0
        for trial in self._study.get_trials(deepcopy=False):
            if number == total:
                return
            point = self._point(trial)
            if point is None:  # a kill came while it was drawn
                self._tell(trial, None)
                continue
            number += 1
            yield point
            if trial.state == TrialState.RUNNING:
                self._tell(trial, value_of(point))
        for _ in range(number, total):
            trial = self._ask()
            point = self._point(trial)
            assert point is not None, "it was drawn just now"
            yield point
            self._tell(trial, value_of(point))

    def _ask(self) -> FrozenTrial:
        from optuna.samplers import TPESampler

        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = TPESampler(seed=self._seed + number)
        distributions = {axis.key: _distribution(axis) for axis in self._axes}
        drawn = self._study.ask(distributions)
        return self._study.get_trials(deepcopy=False)[drawn.number]

    def _tell(self, trial: FrozenTrial, value: float | None) -> None:
        from optuna.trial import TrialState

        if value is None:
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        else:
            self._study.tell(trial.number, value, skip_if_finished=True)

    def _point(self, trial: FrozenTrial) -> Point | None:
        if any(axis.key not in trial.params for axis in self._axes):
            return None
        values = [(axis, trial.params[axis.key]) for axis in self._axes]
        return Point(
            tuple(
                (axis.key, str(value) if isinstance(axis, Choices) else axis.written(value))
                for axis, value in values
            )
        )


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(axis, Choices):
        return CategoricalDistribution(axis.values)
    if axis.is_int:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.is_log)
    return FloatDistribution(axis.low, axis.high, log=axis.is_log)


def _storage(file: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class Unlocked(JournalFileOpenLock):
        """No lock of its own, which a kill would leave behind: the folder's goes with its process."""

        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            pass

    return JournalStorage(JournalFileBackend(str(file), lock_obj=Unlocked(str(file))))


def _drop_torn_line(file: Path) -> None:
    """Cut off a last line that a kill has left unfinished: Optuna would write the next one behind it."""
    try:
        content = file.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(file, content.rfind(b"\n") + 1)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise write_error(file, error) from None
