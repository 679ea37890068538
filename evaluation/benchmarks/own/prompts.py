"""Templates of a described benchmark, rendered over a row: Jinja in its sandbox, unknown names are errors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glmtune.errors import DataError

MAX_CHARS = 1_000_000
"""Of a rendered text: no context holds as much."""


class Templates:
    """Renders texts of a description; errors name the key whose template it is."""

    def __init__(self, path: Any, lines: Mapping[str, int]) -> None:
        """Take what errors name.

        Args:
            path: of the YAML file.
            lines: key → its line.
        """
        self._path, self._lines = path, lines
        self._environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True
        )
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def render(self, key: str, source: str, values: Mapping[str, Any]) -> str:
        """Return a template filled in.

        Args:
            key: what it is in the file.
            source: Jinja.
            values: what it may name.

        Raises:
            DataError: it is no Jinja, names what there is not, or fails.
        """
        template = self._compiled(key, source)
        try:
            text = template.render(**values)
        except Exception as error:  # a template may fail like any program
            raise self._refusal(key, error, f" There are: {', '.join(sorted(values))}.") from None
        if len(text) > MAX_CHARS:
            raise self._refusal(key, f"it renders {len(text):,} characters, at most {MAX_CHARS:,} are asked")
        return text

    def _compile(self, key: str, source: str) -> Template:
        try:
            return self._environment.from_string(source)
        except TemplateError as error:
            raise self._refusal(key, error) from None

    def _refusal(self, key: str, error: object, hint: str = "") -> DataError:
        kind = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
        return DataError(
            f"the template `{key}` cannot be rendered ({kind}{str(error)[:200]}).{hint}",
            path=self._path,
            line=self._lines.get(key.partition("[")[0].partition(".")[0]),
        )
