"""A real `glmtune serve` on the embedded model, which the clients of others ask."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.serving.service.served import serve


@pytest.fixture(scope="session")
def served() -> Iterator[str]:
    """Address of the server, without `/v1`."""
    with serve() as server:
        yield server.url


@pytest.fixture(scope="session")
def served_float32() -> Iterator[str]:
    """The same in float32, where answers can be compared with those of the engine in this process."""
    with serve("model.dtype=float32") as server:
        yield server.url


@pytest.fixture(scope="session")
def clients_python() -> str:
    """A Python with litellm, langchain-openai and lm-evaluation-harness, which are too heavy for CI."""
    found = os.environ.get("GLMTUNE_CLIENTS_PYTHON")
    if not found:
        pytest.skip("GLMTUNE_CLIENTS_PYTHON names no Python with litellm, langchain-openai and lm-eval")
    return found


def run_python(python: str, script: str, *words: str) -> str:
    """Run a script in that Python and return what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": "",
        "OPENAI_API_KEY": "none",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done = subprocess.run(
        [python, "-c", script, *words],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
