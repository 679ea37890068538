"""The three phases of a server, as /health tells them."""

from __future__ import annotations

from typing import Literal

from glmtune.serving.api.state import ServingState

Phase = Literal["loading", "ready", "draining"]


def phase(state: ServingState) -> Phase:
    """Return what a server is doing: loading its model, taking requests, or finishing those it has."""
    if state.is_draining:
        return "draining"
    return "loading" if state.chat is None else "ready"
