"""Data files from anywhere: read in time that follows from their size, or refused as a `DataError` with place."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmtune.data.dataset import load_conversations
from glmtune.data.reading import parquet_rows, text_rows
from glmtune.data.reading.json_values import MAX_DEPTH, MAX_DIGITS
from glmtune.data.reading.readers import read_rows
from glmtune.data.settings import DataSettings
from glmtune.errors import DataError

N = 100_000
SECONDS = 20.0
"""Of the processor, which a busy machine does not add to; for files of a few megabytes, far above the second that a
linear reader takes. What was quadratic took minutes."""


def load(path: Path, **options: object) -> object:
    return load_conversations(DataSettings(train_file=str(path), **options), "train", warn=False)


def in_time(run: Callable[[], object]) -> object:
    start = time.process_time()
    try:
        return run()
    except DataError as error:
        return error
    finally:
        assert time.process_time() - start < SECONDS


ROW = '{"content": "q", "summary": "a"}'
KEYS = ", ".join(f'"k{number}": 1' for number in range(N))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("one_line.json", ROW * N, N),
        ("one_line_array.json", "[" + ", ".join([ROW] * N) + "]", N),
        ("commas.json", (ROW + ",") * N, "comma stands between two objects"),
        ("twice.json", "[" + ", ".join(['{"a": 1, "a": 2}'] * (N // 10)) + "]", "the key `a` occurs twice"),
        ("keys.jsonl", "{" + KEYS + ', "k99999": 2}\n', "`k99999` occurs twice"),
        ("many_keys.jsonl", '{"content": "q", "summary": "a", ' + KEYS + "}\n", 1),
        ("unknown_keys.jsonl", "{" + KEYS + "}\n", "and 99980 more"),
        ("broken.jsonl", '{"content":\n' * N, "more"),
        ("quotes.json", '{"a":"' * N, "no valid JSON"),
        ("blank.json", " " * 50 * N, "the file is empty"),
        ("deep.jsonl", '{"content": ' + "[" * N + "]" * N + "}\n", f"nested more than {MAX_DEPTH}"),
        ("deep_objects.json", ROW + "\n" + '{"a":' * N, f"nested more than {MAX_DEPTH}"),
        ("deep_array.json", "[" * N, f"nested more than {MAX_DEPTH}"),
        ("digits.jsonl", '{"content": ' + "9" * 5000 + ', "summary": "a"}\n', "5000 digits"),
        ("digits.json", '[{"content": -' + "9" * 5000 + ', "summary": "a"}]', f"at most {MAX_DIGITS}"),
        ("huge_float.jsonl", '{"content": 1e999, "summary": "a"}\n', "must be a string"),
        ("not_a_number.jsonl", '{"content": "q", "summary": NaN}\n', "must be a string"),
        (
            "columns.csv",
            ",".join(f"c{i}" for i in range(N)) + "\n" + "x," * (N - 1) + "x\n",
            "and 99980 more",
        ),
        ("columns.tsv", "content\tsummary\t" + "c\t" * N + "\n", "`c` occurs twice"),
        ("quote.csv", 'content,summary\n"' + "x" * 20 * N, "no valid table"),
        ("newlines.csv", "content,summary\n" + "\n" * 50 * N + "q,a\n", 1),
        ("cell.csv", "content,summary\nq," + "長" * 20 * N + "\n", 1),
        ("no_newline.csv", ",".join(f"c{number}" for number in range(N)), "has a header but no rows"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(("json", "jsonl", "sv")) else "",
)
def test_time_follows_from_size(name: str, content: str, expected: int | str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    found = in_time(lambda: load(path))
    if isinstance(expected, int):
        assert not isinstance(found, DataError), found
        assert len(found.conversations) == expected
    else:
        assert isinstance(found, DataError)
        assert expected in str(found)
        assert str(found).startswith(str(path))
        assert len(str(found)) < 20_000, "a message is for people"


def test_wide_tables_keep_what_is_read(tmp_path: Path) -> None:
    """100,000 columns a row would take fifty times the file's size as dictionaries."""
    path = tmp_path / "wide.csv"
    names = ["content", "summary", *(f"c{number}" for number in range(20_000))]
    path.write_text("\n".join([",".join(names), *[",".join(["x"] * len(names))] * 50]), encoding="utf-8")
    loaded = in_time(lambda: load(path))
    assert len(loaded.conversations) == 50
    assert len(loaded.unused_columns) == 20_000
    table = read_rows(path, columns={"content"})
    assert [dict(row.values) for row in table.rows] == [{"content": "x"}] * 50


# ---- no further than asked


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    parse = text_rows._parsed

    def counting(raw: bytes, *rest: object) -> object:
        sizes.append(len(raw))
        return parse(raw, *rest)

    monkeypatch.setattr(text_rows, "_parsed", counting)
    return sizes


def as_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["content", "summary"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


FORMS: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "lines.jsonl": as_lines,
    "array.json": lambda rows: json.dumps(rows, ensure_ascii=False),
    "indented.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=2),
    "table.csv": as_csv,
}


@pytest.mark.parametrize("name", FORMS)
def test_only_the_beginning_is_read_where_few_rows_are_wanted(name: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / name
    rows = [{"content": f"問 {number},\n", "summary": f"答 {number}"} for number in range(60_000)]
    path.write_text(FORMS[name](rows) + "and here it is broken {", encoding="utf-8")
    sizes = counted_reads(monkeypatch)
    loaded = load(path, max_train_samples=100)
    assert [item.messages[0].content for item in loaded.conversations] == [
        row["content"] for row in rows[:100]
    ]
    assert max(sizes) <= text_rows._PREFIX_BYTES < path.stat().st_size


@pytest.mark.parametrize("name", FORMS)
def test_any_beginning_gives_the_same_rows(name: str, tmp_path: Path, monkeypatch) -> None:
    """Cut anywhere, in the middle of characters, cells and rows: a cut row is never taken for a whole one."""
    path = tmp_path / name
    rows = [{"content": f"問題 {number}", "summary": "答\n案," * (number % 3) + "x"} for number in range(9)]
    path.write_text(FORMS[name](rows), encoding="utf-8")
    whole = [dict(row.values) for row in read_rows(path).rows]
    assert whole == rows
    for num_bytes in range(1, path.stat().st_size):
        monkeypatch.setattr(text_rows, "_PREFIX_BYTES", num_bytes)
        for limit in (1, 4, 9, 10):
            assert [dict(row.values) for row in read_rows(path, limit=limit).rows] == whole[:limit]


def test_bad_rows_before_the_last_one_wanted_still_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{ROW}\nbroken\n{ROW}\nbroken too\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        load(path, max_train_samples=2)
    assert len(load(path, max_train_samples=1).conversations) == 1


def test_parquet_is_read_as_far_and_as_wide_as_asked(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"content": ["q"] * 5000, "summary": ["a"] * 5000, "picture": [b"x" * 100] * 5000}
    pq.write_table(pa.table(columns), path, row_group_size=500)
    seen: list[tuple[int, list[str]]] = []
    unpack = pq.ParquetFile.iter_batches

    def watched(self, **options):
        for batch in unpack(self, **options):
            seen.append((batch.num_rows, batch.schema.names))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    loaded = load(path, max_train_samples=300)
    assert len(loaded.conversations) == 300
    assert loaded.unused_columns == ("picture",)
    assert sum(count for count, _ in seen) <= 1000
    assert {tuple(names) for _, names in seen} == {("content", "summary")}


def test_parquet_that_unpacks_beyond_measure(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parquet_rows, "_MIN_ROWS_READ", 1000)
    monkeypatch.setattr(parquet_rows, "_MIN_BYTES_READ", 1 << 20)
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"content": ["q"] * 200_000, "summary": ["a"] * 200_000}), rows)
    texts = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"content": ["q" * 100_000] * 500, "summary": ["a"] * 500}), texts)
    for path in (rows, texts):
        with pytest.raises(DataError, match="unpack to more than") as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert len(load(path, max_train_samples=5).conversations) == 5


def test_parquet_values_that_python_has_no_form_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    text = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"content": text, "summary": ["a"]}), path)
    with pytest.raises(DataError, match="no valid Parquet file") as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_what_never_ends_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(DataError, match="a pipe or a device"):
            load(path)


# ---- whatever the bytes are

few = settings(
    derandomize=True,
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
many = settings(few, derandomize=False, max_examples=3000)

texts = st.text(st.characters() | st.sampled_from('"\\,\n\r\t{}[]\x00\ufeff\u2028\x85'), max_size=12)
MANY_DIGITS = "stands for 4500 digits"
scalars = (
    st.none() | st.booleans() | texts | st.integers() | st.floats() | st.sampled_from(["", " ", MANY_DIGITS])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
COLUMNS = "content summary instruction output input history system messages conversations prompt response"
names = st.sampled_from(COLUMNS.split()) | texts
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool"]) | values,
            "content": values,
            "from": st.sampled_from(["human", "gpt"]) | values,
            "value": values,
            "tool_calls": values,
            "metadata": values,
        },
    )
    | values,
    max_size=3,
)
json_rows = st.lists(st.dictionaries(names, values | messages, max_size=4) | values, max_size=4)


def json_text(value: object) -> str:
    return json.dumps(value).replace(f'"{MANY_DIGITS}"', "9" * 4500)


def assert_read_or_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for options in ({}, {"on_bad_row": "skip"}, {"max_train_samples": 2}, {"layout": "openai"}):
        try:
            loaded = load(path, **options)
        except DataError as error:
            refused = error
        else:
            refused = None
            assert loaded.conversations
            assert all(
                isinstance(message.content, str) for item in loaded.conversations for message in item.messages
            )
        assert refused is None or str(path) in str(refused)
        assert refused is None or refused.line is None or refused.line >= 1


@st.composite
def damaged(draw, contents: st.SearchStrategy[bytes]) -> bytes:
    """Some bytes of a file cut out or put in."""
    content = draw(contents)
    if not content or not draw(st.booleans()):
        return content
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 8)))
    return content[:start] + draw(st.binary(max_size=4)) + content[end:]


json_files = damaged(
    json_rows.map(lambda rows: json_text(rows).encode())
    | json_rows.map(lambda rows: "\n".join(map(json_text, rows)).encode())
    | json_rows.map(lambda rows: "".join(map(json_text, rows)).encode())
    | st.binary(max_size=60)
)
csv_files = damaged(
    st.lists(st.lists(texts, max_size=4), max_size=4).map(
        lambda rows: ("content,summary\n" + "\n".join(",".join(row) for row in rows)).encode(
            "utf-8", "surrogatepass"
        )
    )
    | st.binary(max_size=60)
)


@few
@given(json_files)
def test_any_json(tmp_path: Path, content: bytes) -> None:
    assert_read_or_refused(tmp_path / "rows.json", content)


@few
@given(csv_files)
def test_any_table(tmp_path: Path, content: bytes) -> None:
    assert_read_or_refused(tmp_path / "rows.csv", content)


@pytest.fixture(scope="module")
def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    rows = {"content": ["q", None, "長"], "summary": ["a", "b", "c"], "history": [[["q", "a"]], None, []]}
    pq.write_table(pa.table(rows), sink)
    return sink.getvalue()


@few
@given(data=st.data())
def test_any_parquet(tmp_path: Path, parquet_bytes: bytes, data: st.DataObject) -> None:
    assert_read_or_refused(tmp_path / "rows.parquet", data.draw(damaged(st.just(parquet_bytes))))


@pytest.mark.slow
@many
@given(json_files)
def test_any_json_for_long(tmp_path: Path, content: bytes) -> None:
    assert_read_or_refused(tmp_path / "rows.json", content)


@pytest.mark.slow
@many
@given(csv_files)
def test_any_table_for_long(tmp_path: Path, content: bytes) -> None:
    assert_read_or_refused(tmp_path / "rows.csv", content)


@pytest.mark.slow
@many
@given(data=st.data())
def test_any_parquet_for_long(tmp_path: Path, parquet_bytes: bytes, data: st.DataObject) -> None:
    assert_read_or_refused(tmp_path / "rows.parquet", data.draw(damaged(st.just(parquet_bytes))))
