"""The compiled kernels for every instruction set that this processor has: one machine tests what others run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from glmtune.quantization.kernels.native import LESSER, SWITCH, native_library


@pytest.fixture(scope="module", params=("1", *LESSER))
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a module's tests with each library that can be compiled and run here: the best first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, request.param)
        native_library.cache_clear()
        try:
            if reason := native_library().refusal:
                pytest.skip(f"no native kernels: {reason}")
            yield request.param
        finally:
            native_library.cache_clear()
