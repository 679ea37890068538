"""Every file form is read with its real lines, and every broken file says what to do."""

from __future__ import annotations

import json
import logging

import pytest

from glmtune.data.reading.readers import is_hub_id, read_rows
from glmtune.errors import DataError

ROWS = [
    {"content": "类型#裤", "summary": "很好看的裤子。"},
    {"content": "类型#裙", "summary": "很好看的裙子。"},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def values(path: str) -> list[dict]:
    return [dict(row.values) for row in read_rows(path).rows]


@pytest.mark.parametrize(
    ("name", "content", "kind", "lines"),
    [
        ("a.json", LINES, "jsonl", [1, 2]),
        ("a.jsonl", LINES + "\n\n", "jsonl", [1, 2]),
        ("a.txt", LINES.replace("\n", "\r\n\r\n"), "jsonl", [1, 3]),
        ("a.json", json.dumps(ROWS), "json", [1, 1]),
        ("a.jsonl", json.dumps(ROWS, indent=2, ensure_ascii=False), "json", [2, 6]),
        ("a.json", "\n" + json.dumps(ROWS, indent=4), "json", [3, 7]),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS), "json", [1, 5]),
        ("a.csv", "content,summary\n类型#裤,很好看的裤子。\n类型#裙,很好看的裙子。\n", "csv", [2, 3]),
        ("a.tsv", "content\tsummary\r\n类型#裤\t很好看的裤子。\r\n类型#裙\t很好看的裙子。", "tsv", [2, 3]),
    ],
)
def test_forms_give_the_same_rows_with_their_lines(write, name, content, kind, lines) -> None:
    table = read_rows(write(name, content))
    assert [dict(row.values) for row in table.rows] == ROWS
    assert (table.kind, [row.line for row in table.rows], list(table.bad)) == (kind, lines, [])


def test_csv_cells_over_several_lines_count_as_lines(write) -> None:
    table = read_rows(write("a.csv", 'q,a\n"one\ntwo",x\nthree,"y ""z"", w"\n'))
    assert [(row.line, dict(row.values)) for row in table.rows] == [
        (2, {"q": "one\ntwo", "a": "x"}),
        (4, {"q": "three", "a": 'y "z", w'}),
    ]


def test_parquet(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    table = read_rows(path)
    assert [dict(row.values) for row in table.rows] == ROWS
    assert (table.kind, [row.line for row in table.rows]) == ("parquet", [1, 2])
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="no valid Parquet file"):
        read_rows(path)


@pytest.mark.parametrize(
    ("raw", "encoding"),
    [
        (LINES.encode("utf-8"), "utf-8"),
        (b"\xef\xbb\xbf" + LINES.encode("utf-8"), "utf-8 with BOM"),
        (LINES.encode("gb18030"), "gb18030"),
    ],
)
def test_encodings(write, caplog, raw: bytes, encoding: str) -> None:
    with caplog.at_level(logging.WARNING):
        table = read_rows(write("a.json", raw))
    assert [dict(row.values) for row in table.rows] == ROWS
    assert table.encoding == encoding
    assert ("read as GB18030" in caplog.text) == (encoding == "gb18030")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (LINES.encode("utf-16"), ["line 1", "UTF-16", "iconv"]),
        (b'{"q": "a"}\n{"q": "cr\xe8me br\xfbl\xe9e"}', ["line 2", "0xe8", "no common Chinese"]),
        ('{"q": "日本語のテキスト、カタカナ"}'.encode("shift_jis"), ["line 1", "unknown text encoding"]),
        (b'{"q": "\xff\xff"}', ["0xff", "no GB18030 either", "UTF-8"]),
    ],
)
def test_other_encodings_are_refused(write, raw: bytes, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write("a.json", raw))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "", ["the file is empty", "at least one row"]),
        ("a.json", "\ufeff\n \n", ["the file is empty"]),
        ("a.json", "[]", ["the array is empty"]),
        ("a.json", "hello", ["line 1", "starts with `[` or `{`", "'hello'"]),
        ("a.json", json.dumps(ROWS, indent=2)[:-20], ["line 8", "truncated", "inside the row of line 6"]),
        ("a.json", '[{"a": "b"}, ', ["line 1", "truncated"]),
        ("a.json", '[{"a": "b"}', ["the end of the file", "incomplete"]),
        ("a.json", '[\n{"a": "b"},\n]', ["line 3", "comma", "Delete it"]),
        ("a.json", '[\n{"a": "b",\n}]', ["line 3", "in the row of line 2", "comma after the last field"]),
        ("a.json", '[\n{"a": "b"}\n{"a": "c"}]', ["line 3", "after the row of line 2", "a comma or `]`"]),
        ("a.json", '[{"a": "b"}]\n[{"a": "c"}]', ["line 2", "more text follows"]),
        ("a.json", '{\n"a": "b"\n},\n{\n"a": "c"\n}', ["line 3", "outside an array"]),
        ("a.csv", "a,b\n", ["a header but no rows"]),
        ("a.csv", "a,a\n1,2\n", ["line 1", "the column `a` occurs twice"]),
        ("a.csv", 'a,b\n1,2\n"open,3\n', ["line 3", "no valid table", "double quotes"]),
    ],
)
def test_broken_files(write, name: str, content: str, words: list[str]) -> None:
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert all(word in str(caught.value) for word in [path, *words]), str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("a.jsonl", LINES + '\n{"content": "类型", "summ', 3, ["breaks off", "Complete the line"]),
        ("a.jsonl", LINES.replace("}\n", "},\n"), 1, ["ends with a comma", "`[` and `]`"]),
        ("a.jsonl", '{"a" "b"}\n' + LINES, 1, ["column 6", "expecting ':'", "Correct the line"]),
        ("a.jsonl", LINES + "\n[1, 2]", 3, ["must be a JSON object", "a list ([1, 2])"]),
        ("a.json", '[{"a": "b"},\n"text"]', 2, ["must be a JSON object", "a string ('text')"]),
        ("a.jsonl", LINES + '\n{"a": "b", "a": "c"}', 3, ["the key `a` occurs twice", "Keep one"]),
        ("a.json", '[{"a": "b"},\n{"a": "b", "a": "c"}]', 2, ["the key `a` occurs twice"]),
        ("a.csv", "a,b\n1,2\n1,2,3\n", 3, ["3 cells", "the header has 2", "Quote"]),
    ],
)
def test_bad_rows_do_not_hide_the_good_ones(
    write, name: str, content: str, line: int, words: list[str]
) -> None:
    table = read_rows(write(name, content))
    assert table.rows
    assert [row.line for row in table.bad] == [line]
    assert all(word in table.bad[0].problem for word in words), table.bad[0].problem


def test_missing_files_name_the_nearest(write, tmp_path) -> None:
    write("train.jsonl", LINES)
    write("dev.json", LINES)
    with pytest.raises(DataError, match=r"no such file.*train\.jsonl"):
        read_rows(tmp_path / "trian.json")
    with pytest.raises(DataError, match=r"folder .*nowhere does not exist"):
        read_rows(tmp_path / "nowhere" / "deep" / "train.json")
    with pytest.raises(DataError, match=r"this is a folder.*dev\.json, train\.jsonl"):
        read_rows(tmp_path)


def test_hub_ids() -> None:
    assert is_hub_id("owner/name")
    assert is_hub_id("owner/some-name.v2:validation[:100]")
    assert not is_hub_id("folder/rows.jsonl")
    assert not is_hub_id("./folder/rows")
    assert not is_hub_id("name")


def test_hub_data_sets_are_loaded_by_name(monkeypatch) -> None:
    import datasets

    asked: list[tuple] = []

    def load(name, subset, *, split):
        asked.append((name, subset, split))
        if name.endswith("gone"):
            raise FileNotFoundError("Dataset 'owner/gone' doesn't exist on the Hub")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = read_rows("owner/name", split="validation", hub_subset="zh")
    assert [dict(row.values) for row in table.rows] == ROWS
    assert (table.kind, table.path) == ("hub", "owner/name:validation")
    read_rows("owner/name:dev")
    assert asked == [("owner/name", "zh", "validation"), ("owner/name", None, "dev")]
    with pytest.raises(
        DataError, match=r"`owner/gone` is no file here.*split `train`.*doesn't exist.*or give a file"
    ):
        read_rows("owner/gone")
