"""Settings files from anywhere, and secrets of the environment: bounded, and never written where files stay."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from glmtune.cli import main
from glmtune.errors import ConfigError
from glmtune.settings import as_given, as_written, build_settings
from glmtune.storage.yaml_text import MAX_BYTES, YamlTooLarge, load_yaml, read_yaml
from recipes.train import COMMAND
from recipes.words.compose import load_settings, read_settings

SECRET = "sk-very-secret-7f3a"
SECONDS = 20.0


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [" + ", ".join(["ha"] * 10) + "]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


TOO_MUCH = {
    "aliases": laughs(12),
    "merges": "a: &a {x: 1}\nb: &b {<<: [" + ", ".join(["*a"] * 3000) + "]}\n"
    "c: {<<: [" + ", ".join(["*b"] * 3000) + "]}\n",
    "itself": "a: &a [*a]\n",
    "deep": "a: " + "[" * 100_000,
    "deep_blocks": "\n".join("  " * level + "a:" for level in range(200)),
    "chain": "a0: &a0 [1]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 3000)),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_yaml_that_grows_is_refused(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(YamlTooLarge, match=r"aliases stand for|contains it|more than 64 deep"):
        load_yaml(TOO_MUCH[name])
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize(
    "text",
    ["a: " + "9" * 5000, "a: 0x" + "f" * 5000, "a: 2001-99-99", "a: !!python/object:os.system x", "a: *b"],
)
def test_yaml_values_that_python_has_no_form_for(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_ordinary_yaml_is_what_it_was() -> None:
    text = "a: &a {x: 1, y: [1, 2.5, null, yes, 2024-01-02]}\nb: {<<: *a, z: 長}\nc: [*a, *a]\n"
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml("") is None


def test_files_without_end_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(YamlTooLarge, match="larger than 4 MiB"):
        read_yaml(path)
    path.write_bytes(b"a: \xff\xff\n")
    with pytest.raises(yaml.YAMLError, match="not UTF-8"):
        read_yaml(path)


@given(st.text(st.characters() | st.sampled_from("&*[]{}:,-\n !<'\"|>#%@"), max_size=60))
@settings(derandomize=True, max_examples=300, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    refused = ""
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        refused = str(error)
    assert refused or value == yaml.safe_load(text) or value != value


@pytest.mark.parametrize(
    "text", [laughs(9), "[1, 2]", "3", "", "{1: 2}", "a: " + "9" * 5000, "trainer: [[", "\x00"]
)
def test_settings_files_are_settings(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    start = time.monotonic()
    assert main(["train", "--settings", str(file)]) == 2
    assert time.monotonic() - start < SECONDS
    error = capsys.readouterr().err
    assert str(file) in error or "`1` is no setting" in error
    assert "unexpected" not in error


@pytest.mark.parametrize("name", ["aliases", "merges", "deep"])
def test_configs_of_users_are_bounded(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra copies what aliases stand for: five lines took half a minute, nine would never end."""
    (tmp_path / "recipe").mkdir()
    file = tmp_path / "recipe" / "mine.yaml"
    file.write_text("# @package _global_\n" + TOO_MUCH[name])
    start = time.monotonic()
    assert main(["train", "+recipe=mine", "--config-dir", str(tmp_path), "--cfg"]) == 2
    assert time.monotonic() - start < SECONDS
    assert str(file) in capsys.readouterr().err


def test_wrong_values_are_shown_short() -> None:
    @dataclasses.dataclass(frozen=True)
    class Some:
        number: int = 0

    with pytest.raises(ConfigError) as caught:
        build_settings(Some, {"number": "x" * 1_000_000})
    assert len(str(caught.value)) < 1000


# ---- ${oc.env:...}


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("A_SECRET", SECRET)
    monkeypatch.setenv("A_SEED", "7")
    monkeypatch.setenv("TRACKER", "tensorboard")
    return SECRET


GIVEN = [
    *("+recipe=ptuning", "data.source_prefix=before ${oc.env:A_SECRET} behind", "seed=${oc.env:A_SEED}"),
    *("output_dir=runs/${data.source_prefix}", "trainer.report_to=['${oc.env:TRACKER}']"),
    *("data.train_file='\\${oc.env:A_SECRET}'", "data.dir='${oc.decode:${oc.env:A_SECRET}}'"),
]


def test_references_are_resolved_for_the_run_and_written_as_given(secret: str, tmp_path: Path) -> None:
    found = load_settings(COMMAND, GIVEN)
    assert found.data.source_prefix == f"before {secret} behind"
    assert (found.seed, found.output_dir) == (7, f"runs/before {secret} behind")
    assert (found.data.dir, found.data.train_file) == (secret, "${oc.env:A_SECRET}"), (
        "the last is a plain text"
    )
    written = as_written(dataclasses.asdict(found))
    assert secret not in json.dumps(written)
    assert written["data"]["source_prefix"] == "before ${oc.env:A_SECRET} behind"
    assert written["output_dir"] == "runs/${data.source_prefix}", "by way of another setting"
    assert (written["seed"], written["trainer"]["report_to"]) == ("${oc.env:A_SEED}", ["${oc.env:TRACKER}"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    again = read_settings(COMMAND, file)
    assert again == found
    assert as_written(dataclasses.asdict(again)) == written, "so a resumed run finds nothing changed"


def test_values_that_changed_since_are_written_themselves(secret: str) -> None:
    found = load_settings(COMMAND, GIVEN)
    assert as_given("seed", found.seed) == "${oc.env:A_SEED}"
    assert as_given("seed", 8) == 8
    load_settings(COMMAND, ["+recipe=ptuning"])
    assert as_given("seed", 7) == 7, "references are those of the settings composed last"


def test_literal_dollars_survive_a_file(tmp_path: Path) -> None:
    for text in ("${x}", "\\${x}", "a\\\\${oc.env:HOME}", "$", "\\", "${"):
        values = as_written({"data": {"source_prefix": text}})
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        from omegaconf import OmegaConf

        assert OmegaConf.to_container(OmegaConf.load(file), resolve=True) == {"data": {"source_prefix": text}}


def test_unset_variables_and_circles_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "+recipe=ptuning", "data.source_prefix=${oc.env:NOT_SET_ANYWHERE}"]) == 2
    assert "environment variable `NOT_SET_ANYWHERE`, which is not set" in capsys.readouterr().err
    assert main(["train", "+recipe=ptuning", "data.source_prefix=${data.source_prefix}"]) == 2
    assert "refers to itself" in capsys.readouterr().err


def test_cfg_shows_no_secret(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *GIVEN, "--cfg"]) == 0
    said = capsys.readouterr().out
    assert secret not in said
    assert "seed: ${oc.env:A_SEED}" in said


def test_launched_processes_get_references(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that a launcher writes, and the line that ssh runs elsewhere, hold no secret."""
    from glmtune.training.distributed import start

    handed: list[object] = []
    monkeypatch.setattr(start, "start", lambda command, values, *rest, **more: handed.append(values) or 0)
    monkeypatch.setattr("recipes.train._check_memory", lambda config: None)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["train", *GIVEN]) == 0
    assert secret not in json.dumps(handed)
    assert handed[0]["data"]["source_prefix"] == "before ${oc.env:A_SECRET} behind"


def test_a_run_leaves_no_secret_in_its_folder(secret: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """A whole run whose data lie under a secret name; the same command finds it finished, with the secret gone."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / f"{secret}.jsonl"
    data.write_text('{"content": "問", "summary": "答"}\n' * 4, encoding="utf-8")
    monkeypatch.setenv("DATA_FILE", str(data))
    words = [
        "train",
        "+recipe=ptuning",
        "model=glm-tiny",
        "data=files",
        "data.train_file=${oc.env:DATA_FILE}",
    ]
    words += [
        "data.source_prefix=${oc.env:A_SECRET}",
        "trainer.max_steps=1",
        "output_dir=run",
        "prefix.pre_seq_len=2",
    ]
    words += ["plan.enforce=false", "trainer.per_device_train_batch_size=2", "model.device=cpu"]
    assert main(words) == 0, capsys.readouterr().err
    run = tmp_path / "run"
    holders = [
        path.name for path in run.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
    ]
    assert holders == []
    stored = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert stored["data"]["train_file"] == "${oc.env:DATA_FILE}"
    assert main(words) == 0
    assert "finished at step 1" in capsys.readouterr().err


def test_yaml_is_read_by_one_reader() -> None:
    """yaml's own `safe_load` runs no code, but follows aliases to any size."""
    from scripts.architecture import REPO, modules

    others = [
        path.relative_to(REPO).as_posix()
        for name, path in modules().items()
        if name != "glmtune.storage.yaml_text" and "yaml.safe_load(" in path.read_text(encoding="utf-8")
    ]
    assert others == []
