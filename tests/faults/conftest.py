"""A warm process for the tests of this folder that spoil real commands, and their undisturbed results."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.faults.cases import Workshop
from tests.faults.injection import WarmCommands, missing


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Generator[WarmCommands]:
    """Runs commands as forks of one process; its start takes seconds, so there is one for all tests."""
    if reason := missing():
        pytest.skip(reason)
    with WarmCommands(tmp_path_factory.mktemp("warm")) as running:
        yield running


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Working folders, and what every case comes to undisturbed."""
    return Workshop(tmp_path_factory.mktemp("workshop").resolve())
