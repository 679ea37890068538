"""Names of files made of what users call models: the same on every system, and none that Windows refuses."""

from __future__ import annotations

import string
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import evaluate
from evaluation.compare import build
from glmtune.errors import ConfigError
from glmtune.export.gguf.folder import model_name
from glmtune.inference import adapter_names
from glmtune.models.releases.source import resolve_source
from glmtune.planning import published
from glmtune.serving.served_names import base_names
from glmtune.storage.names import last_part, portable_name
from recipes.predict import COMMAND as PREDICT
from recipes.words.compose import load_settings

SOURCES = {
    "chatglm2-6b": "chatglm2-6b",
    "THUDM/chatglm2-6b": "chatglm2-6b",
    "modelscope:ZhipuAI/chatglm2-6b": "chatglm2-6b",
    "modelscope:chatglm2-6b": "chatglm2-6b",
    r"C:\models\chatglm2-6b": "chatglm2-6b",
    "C:/models/chatglm2-6b/": "chatglm2-6b",
    r"\\server\share\chatglm2-6b": "chatglm2-6b",
    r"..\chatglm2-6b" + "\\": "chatglm2-6b",
    "/srv/models/chatglm2-6b": "chatglm2-6b",
}


@pytest.mark.parametrize(("source", "name"), SOURCES.items(), ids=[f"source{n}" for n in range(len(SOURCES))])
def test_the_last_part_is_the_name(source: str, name: str) -> None:
    assert last_part(source) == name
    assert model_name(source) == name
    if ":" not in source[2:] and not source.startswith("modelscope:"):
        assert PureWindowsPath(source).name == name, "as Windows sees it"


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
def test_any_text_makes_a_name_that_windows_takes(text: str) -> None:
    name = portable_name(text)
    assert name
    assert not set(name) & {*'<>:"/\\|?*', *map(chr, range(32))}
    assert name[-1] not in ". "
    assert name.partition(".")[0].lower() not in {"con", "prn", "aux", "nul", "com1", "lpt9"}
    assert PureWindowsPath(name).parts == (name,), "one part, and no drive"
    assert portable_name(name) == name


@given(st.text(alphabet=string.ascii_letters + string.digits + "-_.", min_size=1, max_size=30))
def test_plain_names_stay(text: str) -> None:
    name = portable_name(text)
    assert name in (text.rstrip("."), f"_{text.rstrip('.')}", "unnamed")


@pytest.mark.parametrize("name", ["a:b", r"C:\models\aux", "CON", "nul.v1", "name. "])
def test_folders_of_evaluations(name: str) -> None:
    for folder in (
        evaluate._named("ceval", last_part(name), "12345678"),
        evaluate._named(last_part(name), "ceval"),
    ):
        assert ":" not in folder.name
        assert "\\" not in folder.name


def test_the_default_folder_of_a_prediction() -> None:
    from recipes import predict

    config = load_settings(PREDICT, ["model=modelscope:chatglm2-6b"])
    assert predict._default_folder(config, None) == Path("runs/predict-base-chatglm2-6b")


@pytest.mark.parametrize("source", [r"C:\no\such", "C:/no/such", r"\\server\no", r"..\no"])
def test_a_path_of_windows_is_read_as_one(source: str) -> None:
    """Not as the misspelt name of a release."""
    with pytest.raises(ConfigError, match=r"but there is no such folder \(looked in ") as raised:
        resolve_source(source)
    assert source in str(raised.value)


def test_names_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class WindowsPath(PureWindowsPath):
        """As far as the names go; nothing is there."""

        def expanduser(self) -> PureWindowsPath:
            return self

        def resolve(self) -> PureWindowsPath:
            return self

        def is_dir(self) -> bool:
            return False

    monkeypatch.setattr(adapter_names, "Path", WindowsPath)
    assert adapter_names.derived_name(r"D:\runs\adgen") == "adgen"
    assert adapter_names.derived_name(r"D:\runs\adgen\checkpoint-20") == "adgen-checkpoint-20"
    assert adapter_names.derived_name(r"runs\adgen\last") == "adgen"
    assert adapter_names.derived_name(r"downloads\pytorch_model.bin") == "downloads"
    monkeypatch.setattr("glmtune.serving.served_names.Path", WindowsPath)
    assert base_names("THUDM/chatglm2-6b", None, ()) == ("chatglm2-6b", "THUDM/chatglm2-6b")


def test_reports_of_others_are_found_for_a_folder_of_windows() -> None:
    from types import SimpleNamespace

    found = {
        name: published.reports_for(
            SimpleNamespace(geometry=SimpleNamespace(name=name), bits=4, tune="prefix")  # type: ignore[arg-type]
        )
        for name in ("chatglm2-6b", r"D:\models\chatglm2-6b")
    }
    assert found["chatglm2-6b"] == found[r"D:\models\chatglm2-6b"]


def test_comparisons_use_the_same_rule() -> None:
    assert build.last_part is last_part is evaluate.last_part


WINDOWS_VALUES = (r"C:\runs\new", r"D:\a (1)\b", r"\\server\share\run", r"runs\a,b", r".\x y", "C:/runs/new")


@pytest.mark.parametrize("value", WINDOWS_VALUES, ids=[f"value{n}" for n in range(len(WINDOWS_VALUES))])
def test_paths_of_windows_arrive_as_typed(value: str) -> None:
    config = load_settings(PREDICT, [f"output_dir={value}", f"model={value}", f"data={value}.jsonl"])
    assert config.output_dir == value
    assert config.model.source == value
    assert config.data.test_file == f"{value}.jsonl"
