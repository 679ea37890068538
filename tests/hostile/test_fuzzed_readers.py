"""Whatever a file holds, its reader takes it or refuses it with a message: never a stack trace, never without end.

Valid files are damaged by chance: bits, cuts, and, where they are JSON, values of other kinds and sizes at any place.
Seeds are fixed, so CI tries the same files every time; `-m slow` tries many more, each time others. A file that was
once taken badly is kept in `corpus/READER/` and tried for ever: put it there when a test shows one.
"""

from __future__ import annotations

import json
import math
import signal
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmtune.errors import GlmtuneError
from tests.hostile.readers import FOLDERS, READERS, Reader

CORPUS = Path(__file__).with_name("corpus")
KEPT = sorted(path for path in CORPUS.glob("*/*") if path.is_file())
DEEP_OR_LONG = ("[" * 100_000, '{"a":' * 100_000, "9" * 5_000, '{"a": ' + "9" * 5_000 + "}")
JSON_READERS = [
    name for name, reader in READERS.items() if Path(reader.file).suffix in (".json", ".jsonl", ".yaml")
]
LONGEST_SECONDS = 20
"""For files of a few kilobytes: an order of magnitude more than any takes on a busy machine."""
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 10**6, 10**20, -(10**30), 0.5, math.nan, math.inf, 1e308),
    *(
        "",
        "a",
        "10",
        "\x00",
        "\x1b]0;x\x07",
        "\ud800",
        "\u2028",
        "../../x",
        "(a+)+$",
        "[bold]",
        "${oc.env:HOME}",
    ),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": {"c": []}}}, ["a"] * 50),
]


@contextmanager
def limited(seconds: int) -> Generator[None]:
    """End what does not end by itself, where the system can."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Case:
    """A reader, the file that it reads, and what was valid in it."""

    reader: Reader
    file: Path
    valid: bytes

    def read(self, content: bytes) -> str | None:
        """Read the file with another content: the message that refuses it; what is no message is raised."""
        self.file.write_bytes(content)
        with warnings.catch_warnings(), limited(LONGEST_SECONDS):
            warnings.simplefilter("ignore")
            try:
                self.reader.read(self.file.parents[self.reader.file.count("/")])
            except GlmtuneError as error:
                return str(error) or pytest.fail("an error without words")
            finally:
                self.file.write_bytes(self.valid)
        return None


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List where a JSON value has something, the whole first."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Return a JSON value with another one at a place."""
    if not path:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], change)
    return copy


def parsed(content: bytes) -> list[Any] | None:
    """Return the values of a file that is JSON, or has one a line."""
    try:
        return [json.loads(content)]
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in content.decode().split("\n") if line]
    except ValueError:
        return None


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file that was damaged."""
    content = bytearray(valid)
    values = parsed(bytes(content))
    if values is not None and draw(st.booleans()):
        which = draw(st.integers(0, len(values) - 1))
        for _ in range(draw(st.integers(1, 2))):
            path = draw(st.sampled_from(places(values[which])))
            odd = draw(st.sampled_from(ODD))
            more = draw(st.sampled_from(["replace", "repeat", "add"]))
            values[which] = changed(
                values[which], path, lambda old, odd=odd, more=more: mixed(old, odd, more)
            )
        text = "\n".join(json.dumps(value, ensure_ascii=draw(st.booleans())) for value in values)
        return text.encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "anything"]))
    if kind == "anything":
        return draw(st.binary(max_size=200))
    start = draw(st.integers(0, max(0, len(content) - 1)))
    length = draw(st.integers(0, 64))
    if kind == "flip":
        content[start] ^= draw(st.integers(1, 255))
    elif kind == "cut":
        del content[start : start + length if draw(st.booleans()) else None]
    elif kind == "insert":
        content[start:start] = draw(st.binary(min_size=1, max_size=64))
    else:
        content[start:start] = content[start : start + length] * draw(st.integers(1, 20))
    return bytes(content)


def mixed(old: Any, odd: Any, how: str) -> Any:
    """Return what stands in the place of a value."""
    if how == "repeat":
        return [old] * 3
    if how == "add" and isinstance(old, dict):
        return {**old, "unheard_of": odd}
    return odd


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Valid files of a kind, made when they are first asked for."""

    @cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        FOLDERS[name](folder)
        return folder

    return made


@pytest.fixture
def case(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> Case:
    """The case of the reader that a test is given by name."""
    reader = READERS[request.getfixturevalue("name")]
    (file,) = folders(reader.folder).glob(reader.file)
    return Case(reader, file, file.read_bytes())


@pytest.mark.parametrize("name", READERS)
def test_a_valid_file_is_read(name: str, case: Case) -> None:
    """Else everything would be refused at its first line."""
    assert case.read(case.valid) is None


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, case: Case) -> None:
    tried = []

    @settings(
        max_examples=30,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(content=damaged(case.valid))
    def check(content: bytes) -> None:
        tried.append(content)
        case.read(content)

    check()
    assert len(set(tried)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files(name: str, case: Case) -> None:
    tried = []

    @settings(max_examples=1500, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(content=damaged(case.valid))
    def check(content: bytes) -> None:
        tried.append(content)
        case.read(content)

    check()
    assert len(set(tried)) > 500


@pytest.mark.parametrize(
    ("name", "kept"),
    [(path.parent.name, path) for path in KEPT],
    ids=[f"{path.parent.name}-{path.stem}" for path in KEPT],
)
def test_files_that_were_once_taken_badly(name: str, kept: Path, case: Case) -> None:
    case.read(kept.read_bytes())
    assert case.read(case.valid) is None, "the valid file is read again after it"


@pytest.mark.parametrize("content", DEEP_OR_LONG, ids=["lists", "objects", "digits", "digits in an object"])
@pytest.mark.parametrize("name", JSON_READERS)
def test_deep_and_long(name: str, content: str, case: Case) -> None:
    """What Python's own reader answers with RecursionError, or with a limit of digits."""
    case.read(content.encode())
    assert case.read(case.valid) is None
