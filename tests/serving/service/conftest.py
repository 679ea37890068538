"""A server on the embedded model that tests share; those that end it or need other settings start their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.service.served import Served, serve


@pytest.fixture(scope="package")
def served() -> Iterator[Served]:
    with serve("limits.header_seconds=2", "limits.body_seconds=2", "limits.max_body_bytes=200000") as server:
        yield server
