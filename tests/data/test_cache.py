"""Encoded rows that are kept: the same as those made anew, whole or not there, and made by one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glmtune.data import dataset
from glmtune.data.check import check_data
from glmtune.data.dataset import EncodedSplit, load_split
from glmtune.data.encoded import cache, passing, table, workers
from glmtune.data.encoded.identity import tokenizer_digest
from glmtune.data.reading import text_rows
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError, DataError, GlmtuneError
from glmtune.loading import load_tokenizer
from tests.warm.start import warm_python


@pytest.fixture
def rows_path(write) -> str:
    rows = [{"prompt": f"{n} " + "q" * (1 + n % 30), "response": "a" * (1 + n % 7)} for n in range(700)]
    return write("rows.jsonl", "\n".join(json.dumps(row) for row in rows))


@pytest.fixture
def kept(tmp_path: Path, rows_path: str) -> DataSettings:
    return DataSettings(train_file=rows_path, cache="always", cache_dir=str(tmp_path / "kept"))


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_tokenizer("glm-tiny")


def content(split: EncodedSplit) -> tuple[Any, ...]:
    rows = split.rows
    return (
        rows["input_ids"][:],
        rows["labels"][:],
        rows["length"][:],
        split.lengths.tolist(),
        split.num_loss_tokens_per_row.tolist(),
        (split.num_conversations, split.num_tokens, split.num_loss_tokens),
        (split.truncation, split.facts, list(split.bad), split.sample),
        replace(split.settings, cache="auto", cache_dir=None, num_workers=None),
    )


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **settings: object) -> Any:
        raise AssertionError("rows are encoded again")

    monkeypatch.setattr(passing, "run_batches", refuse)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_rows_of_the_cache_are_those_of_memory(
    tiny, kept: DataSettings, monkeypatch, num_workers: int
) -> None:
    expected = content(load_split(replace(kept, cache="never"), "train", tiny))
    settings = replace(kept, num_workers=num_workers, max_source_length=expected[-1].max_source_length)
    monkeypatch.setattr(table, "ROWS_PER_TABLE", 300)
    assert content(load_split(kept if num_workers == 1 else settings, "train", tiny)) == expected
    forbid_encoding(monkeypatch)
    again = load_split(kept, "train", tiny)
    assert content(again) == expected
    assert again.rows.cache_files == [] or again.rows.data.nbytes > 0
    assert isinstance(again.lengths, np.memmap)


def test_small_files_are_not_kept(tiny, kept: DataSettings) -> None:
    load_split(replace(kept, cache="auto"), "train", tiny)
    assert not Path(str(kept.cache_dir)).exists()


@pytest.mark.parametrize(
    "change",
    [{"max_target_length": 3}, {"source_prefix": "p"}, {"system": "s"}, {"loss_on": "everything"}],
    ids=lambda change: next(iter(change)),
)
def test_settings_that_shape_rows_make_others(tiny, kept: DataSettings, change: dict[str, Any]) -> None:
    first = load_split(kept, "train", tiny)
    changed = replace(first.settings, **change)
    assert content(load_split(changed, "train", tiny)) == content(
        load_split(replace(changed, cache="never"), "train", tiny)
    )
    assert content(load_split(changed, "train", tiny))[:3] != content(first)[:3]


def test_a_file_changed_in_one_byte_is_read_anew(tiny, kept: DataSettings) -> None:
    before = load_split(kept, "train", tiny)
    file = Path(str(kept.train_file))
    stat = file.stat()
    file.write_bytes(file.read_bytes().replace(b"0 q", b"9 q", 1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = load_split(kept, "train", tiny)
    assert after.rows[0]["input_ids"] != before.rows[0]["input_ids"]
    assert after.fingerprint != before.fingerprint


def test_what_a_check_has_made_training_takes(tiny, kept: DataSettings, monkeypatch) -> None:
    report = check_data(kept, tiny)
    forbid_encoding(monkeypatch)
    split = load_split(kept, "train", tiny)
    assert report.splits[0].num_tokens == split.num_tokens
    again = check_data(kept, tiny)
    assert replace(again, max_source_length=0) == replace(report, max_source_length=0)


def test_bad_rows_are_refused_from_the_cache_as_from_the_file(tiny, kept: DataSettings, monkeypatch) -> None:
    file = Path(str(kept.train_file))
    file.write_text(
        file.read_text(encoding="utf-8") + '\nbroken\n{"prompt": "q", "response": ""}\n', encoding="utf-8"
    )
    with pytest.raises(DataError) as before:
        load_split(kept, "train", tiny)
    skipping = replace(kept, on_bad_row="skip")
    split = load_split(skipping, "train", tiny)
    assert [row.line for row in split.bad] == [701, 702]
    forbid_encoding(monkeypatch)
    assert content(load_split(skipping, "train", tiny))[6] == content(split)[6]
    with pytest.raises(DataError) as after:
        load_split(kept, "train", tiny)
    assert str(after.value) == str(before.value)


def test_rows_that_do_not_fit_are_refused_from_the_cache_too(tiny, write, kept: DataSettings) -> None:
    rows = [{"instruction": "q", "output": "a", "system": "S" * length} for length in (1, 90)]
    settings = replace(
        kept,
        train_file=write("long.json", json.dumps(rows, indent=1)),
        max_source_length=40,
        max_target_length=5,
    )
    texts = []
    for each in (replace(settings, cache="never"), settings):
        with pytest.raises(DataError, match="line 7") as caught:
            load_split(each, "train", tiny)
        texts.append(str(caught.value))
    assert len(load_split(replace(settings, on_bad_row="skip"), "train", tiny).rows) == 1
    with pytest.raises(DataError, match="line 7") as caught:
        load_split(settings, "train", tiny)
    assert [str(caught.value), *texts] == [texts[0]] * 3


@pytest.mark.parametrize("harm", ["cut", "missing", "meta", "other columns", "pickle"])
def test_a_damaged_entry_is_made_again(tiny, kept: DataSettings, caplog, harm: str) -> None:
    expected = content(load_split(kept, "train", tiny))
    (rows,) = Path(str(kept.cache_dir)).glob("*/rows.arrow")
    lengths = rows.with_name("lengths.npy")
    if harm == "cut":
        rows.write_bytes(rows.read_bytes()[:-100])
    elif harm == "missing":
        lengths.unlink()
    elif harm == "meta":
        rows.with_name(cache.META).write_text("{")
    elif harm == "other columns":
        import pyarrow as pa

        other = pa.table({"input_ids": ["x"]})
        with pa.ipc.new_stream(str(rows), other.schema) as writer:
            writer.write_table(other)
    else:
        np.save(lengths, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    if harm in ("other columns", "pickle"):  # as if it had been written so
        meta = json.loads(rows.with_name(cache.META).read_text())
        meta["files"] = {name: (rows.parent / name).stat().st_size for name in meta["files"]}
        rows.with_name(cache.META).write_text(json.dumps(meta))
    assert content(load_split(kept, "train", tiny)) == expected
    assert ("is damaged" in caplog.text) == (harm != "missing")


def test_a_killed_encoding_leaves_nothing_that_is_taken_for_whole(tiny, kept: DataSettings) -> None:
    code = (
        "import os, signal, json, sys\n"
        "from dataclasses import replace\n"
        "from glmtune.data import dataset\n"
        "from glmtune.data.encoded import passing\n"
        "from glmtune.data.settings import DataSettings\n"
        "from glmtune.loading import load_tokenizer\n"
        "real = passing.run_batches\n"
        "def dying(*args, **settings):\n"
        "    for number, each in enumerate(real(*args, **settings)):\n"
        "        yield each\n"
        "        if number == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "passing.run_batches = dying\n"
        "settings = DataSettings(**json.loads(sys.argv[1]))\n"
        "dataset.load_split(settings, 'train', load_tokenizer('glm-tiny'))\n"
    )
    values = {name: getattr(kept, name) for name in ("train_file", "cache", "cache_dir")}
    values |= {"max_source_length": 60, "max_target_length": 60, "num_workers": 2}
    done = subprocess.run([*warm_python(), "-c", code, json.dumps(values)], check=False)
    assert done.returncode == -9
    root = Path(str(kept.cache_dir))
    assert list(root.glob(".*")), "it had begun"
    assert not list(root.glob("*/" + cache.META))
    settings = DataSettings(**values)
    assert content(load_split(settings, "train", tiny)) == content(
        load_split(replace(settings, cache="never", num_workers=1), "train", tiny)
    )
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


def _encode(values: dict[str, Any], started: Any, results: Any) -> None:
    calls = []
    real = passing.run_batches
    passing.run_batches = lambda *args, **settings: calls.append(args[0]) or real(*args, **settings)
    tokenizer: Any = load_tokenizer("glm-tiny")
    started.wait()
    split = load_split(DataSettings(**values), "train", tokenizer)
    results.put((len(calls), split.num_tokens, split.fingerprint))


def test_one_process_encodes_and_others_wait(kept: DataSettings) -> None:
    values = {name: getattr(kept, name) for name in ("train_file", "cache", "cache_dir")}
    context = multiprocessing.get_context("forkserver")  # three that import everything take long
    context.set_forkserver_preload(["glmtune.data.dataset", "transformers", "datasets"])
    started, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_encode, args=(values, started, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(calls for calls, *_ in found)[-1] <= 2
    assert sum(calls for calls, *_ in found) == 2, "measured once, encoded once"
    assert len({rest for _, *rest in [(c, t, f) for c, t, f in found] for rest in [tuple(rest)]}) == 1


def test_an_unwritable_place_is_said(tiny, kept: DataSettings, write) -> None:
    settings = replace(kept, cache_dir=write("file", "x"))
    with pytest.raises(ConfigError, match=r"cannot be kept in .*data\.cache_dir=FOLDER.*data\.cache=never"):
        load_split(settings, "train", tiny)


def test_a_usual_place_that_is_unwritable_costs_time_alone(
    tiny, kept: DataSettings, monkeypatch, caplog, write
) -> None:
    monkeypatch.setattr(passing, "LARGE_BYTES", 1)
    usual = replace(kept, cache="auto", cache_dir=None, num_workers=1)
    expected = content(load_split(replace(kept, cache="never", num_workers=1), "train", tiny))

    def nowhere() -> Path:
        raise OSError("there is no home folder")

    for place in (nowhere, lambda: Path(write("file", "x"))):
        caplog.clear()
        monkeypatch.setattr(cache, "cache_folder", place)
        assert content(load_split(usual, "train", tiny)) == expected
        assert "cannot be kept" in caplog.text
        assert "held in memory" in caplog.text


def test_a_lock_that_cannot_be_made_is_said(tiny, kept: DataSettings, monkeypatch) -> None:
    def refuse(path: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("glmtune.storage.lock._open", refuse)
    with pytest.raises(ConfigError, match=r"cannot be kept in .*kept: Permission denied.*data\.cache_dir"):
        load_split(kept, "train", tiny)


def test_what_is_no_file_is_not_waited_for(tiny, kept: DataSettings, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="a pipe or a device"):
        load_split(replace(kept, train_file=str(tmp_path / "pipe.jsonl")), "train", tiny)


def test_clearing(tiny, kept: DataSettings) -> None:
    load_split(kept, "train", tiny)
    root = Path(str(kept.cache_dir))
    (root / "mine.txt").write_text("x")
    (root / "folder").mkdir()
    done = cache.clear(root)
    assert done.num_sets == 2
    assert done.num_bytes > 700 * 8
    assert sorted(path.name for path in root.iterdir()) == ["folder", "mine.txt"]
    assert cache.clear(root / "nowhere") == cache.Cleared(0, 0)


def test_a_worker_that_ends_is_said(tiny, kept: DataSettings, monkeypatch) -> None:
    monkeypatch.setattr(workers, "__name__", "os import _exit as serve; serve(3) #")
    with pytest.raises(GlmtuneError, match=r"exit code 3.*data\.num_workers=1"):
        load_split(replace(kept, num_workers=2), "train", tiny)


def test_errors_of_workers_reach_the_user(tiny, write, kept: DataSettings) -> None:
    settings = replace(
        kept, train_file=write("a.jsonl", '{"prompt": "q", "response": "a"}\n' * 3), num_workers=2
    )
    again = load_split(replace(settings, max_source_length=60, max_target_length=5), "train", tiny)
    assert len(again.rows) == 3
    batches = [[again.sample]]
    broken = [[None]]
    assert [
        len(result.lengths)
        for _, result in workers.run_batches("encode", batches, tiny, again.settings, num_workers=2)
    ] == [1]
    with pytest.raises(RuntimeError, match="NoneType"):
        list(workers.run_batches("encode", broken, tiny, again.settings, num_workers=2))  # pyright: ignore[reportArgumentType]


def test_a_tokenizer_is_told_by_what_it_holds(tiny) -> None:
    own = tokenizer_digest(tiny)
    again: Any = load_tokenizer("glm-tiny")
    again.deprecation_warnings["x"] = True
    assert tokenizer_digest(again) == own
    again.add_tokens(["newtoken"])
    assert tokenizer_digest(again) != own
    code = "from glmtune.loading import load_tokenizer as l; from glmtune.data.encoded.identity import tokenizer_digest as d; t = l('glm-tiny'); t.add_tokens(['x1', 'x2', 'x3']); print(d(t))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},  # sets have another order there
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    same: Any = load_tokenizer("glm-tiny")
    same.add_tokens(["x1", "x2", "x3"])
    assert other == f"{tokenizer_digest(same)}\n"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.jsonl.gz", "bom.jsonl"])
def test_rows_are_the_same_read_as_a_whole_and_one_by_one(write, monkeypatch, name: str) -> None:
    import gzip

    texts = [f"行 {n}\u2028," + "x" * (n % 5) for n in range(50)]
    if name.endswith(".csv"):
        raw = (
            "prompt,response,\r\n"
            + "".join(f'"{t}\n","a {n}",{n if n > 40 else ""}\r\n' for n, t in enumerate(texts))
        ).encode()
    else:
        lines = [json.dumps({"prompt": t, "response": "a", "extra": 1}, ensure_ascii=False) for t in texts]
        lines.insert(7, "")
        lines.insert(9, "broken")
        raw = "\n".join(lines).encode()
    raw = b"\xef\xbb\xbf" + raw if name == "bom.jsonl" else gzip.compress(raw) if name.endswith("gz") else raw
    path = write(name, raw)
    settings = DataSettings(train_file=path, on_bad_row="skip")
    whole = dataset.load_conversations(settings, "train")
    monkeypatch.setattr(text_rows, "STREAMED_BYTES", 0)
    monkeypatch.setattr(text_rows, "FEW_ROWS", 0)
    assert text_rows.scan_text(Path(path)) is not None
    assert dataset.load_conversations(settings, "train") == whole
    limited = replace(settings, max_train_samples=11)
    assert dataset.load_conversations(limited, "train").conversations == whole.conversations[:11]
