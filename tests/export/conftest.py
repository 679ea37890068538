"""Tiny checkpoints of every generation, as the end-to-end tests make them."""

from tests.e2e.conftest import make_base

__all__ = ["make_base"]
