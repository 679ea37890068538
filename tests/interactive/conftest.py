"""What was tuned, and a server that has it, for chats and pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interactive.tuned import Tuned, write_tools_base, write_tuned
from tests.serving.service.served import Served, serve

KEY = "sk-of-this-test-alone"


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A prefix and a LoRA of `glm-tiny`."""
    return write_tuned(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="session")
def tools_base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that knows tools, and a file of them."""
    return write_tools_base(tmp_path_factory.mktemp("tools") / "glm-4-tiny")


@pytest.fixture(scope="module")
def tuned_server(tuned: Tuned) -> Iterator[Served]:
    """`glmtune serve` with the prefix and the LoRA, behind a key."""
    words = (f"prefix_path={tuned.prefix}", f"adapter_path={tuned.lora}", "answers.default_model=glm-tiny")
    # What waits for /health needs no key.
    with serve(*words, environment={"GLMTUNE_API_KEYS": KEY}) as running:
        yield running
