"""A run is continued only by itself."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from glmtune.errors import ConfigError, DataError
from glmtune.inference.predict.predictions import Prediction
from glmtune.inference.predict.run_identity import RunIdentity, answered_rows, deciding_settings, open_journal
from glmtune.inference.settings import GenerationSettings

IDENTITY = RunIdentity(
    model="glm-tiny", model_fingerprint="m", prefix="", prefix_sha256="", pre_seq_len=0, template="chatglm2",
    dtype="float32", data="dev.json", split="test", data_fingerprint="d", num_rows=4, max_source_length=64,
    max_target_length=64, source_prefix="", generation=deciding_settings(GenerationSettings()), glmtune_version="1",
)  # fmt: skip
ROW = Prediction(row=2, prediction="a", reference="b")


def opened(folder, identity, **resume):
    with open_journal(folder) as journal:
        return answered_rows(journal, identity, **resume)


def append(folder, row):
    with open_journal(folder) as journal:
        journal.append(row)


def test_rows_are_kept_and_a_half_written_one_is_dropped(tmp_path):
    folder = tmp_path / "deep" / "run"
    assert opened(folder, IDENTITY) == []
    append(folder, ROW)
    with (folder / "generated_predictions.jsonl").open("a") as file:
        file.write('{"row": 3, "predic')
    assert opened(folder, IDENTITY) == [ROW]


def test_never_starts_again(tmp_path):
    opened(tmp_path, IDENTITY)
    append(tmp_path, ROW)
    other = dataclasses.replace(IDENTITY, data_fingerprint="e")
    assert opened(tmp_path, other, resume="never") == []
    assert json.loads((tmp_path / "predict_config.json").read_text())["data_fingerprint"] == "e"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_fingerprint": "e"}, r'data_fingerprint: "d" there, "e" now'),
        ({"model_fingerprint": "n"}, r'model_fingerprint: "m" there, "n" now'),
        ({"prefix_sha256": "p"}, r'prefix_sha256: "" there, "p" now'),
        ({"prefix_strength": 0.5}, r"prefix_strength: 1.0 there, 0.5 now"),
        ({"adapter_scale": 2.0}, r"adapter_scale: 1.0 there, 2.0 now"),
        ({"max_target_length": 128}, r"max_target_length: 64 there, 128 now"),
        (
            {"generation": deciding_settings(GenerationSettings(max_new_tokens=9))},
            r'generation: .*"max_new_tokens": 128.* there, .*"max_new_tokens": 9.* now',
        ),
    ],
)
def test_rows_of_another_run_are_refused(tmp_path, change, message):
    opened(tmp_path, IDENTITY)
    append(tmp_path, ROW)
    with pytest.raises(ConfigError, match=rf"1 rows of another run.*{message}.*resume=never"):
        opened(tmp_path, dataclasses.replace(IDENTITY, **change))


def test_rows_drawn_in_another_way_are_refused(tmp_path):
    """The same seed gives other answers there: runs begun before the engine drew do not name the way."""
    sampling = deciding_settings(GenerationSettings(do_sample=True))
    older = {name: value for name, value in sampling.items() if name != "drawing"}
    opened(tmp_path, dataclasses.replace(IDENTITY, generation=older))
    append(tmp_path, ROW)
    with pytest.raises(ConfigError, match=r'generation: .* there, .*"drawing": 2.* now.*resume=never'):
        opened(tmp_path, dataclasses.replace(IDENTITY, generation=sampling))
    assert opened(tmp_path, dataclasses.replace(IDENTITY, generation=older)) == [ROW]


def test_names_paths_and_batch_sizes_do_not_matter(tmp_path):
    opened(tmp_path, IDENTITY)
    append(tmp_path, ROW)
    moved = dataclasses.replace(IDENTITY, model="other/name", data="elsewhere.json", glmtune_version="2")
    assert opened(tmp_path, moved) == [ROW]
    assert deciding_settings(GenerationSettings(batch_size=1, seed=5)) == IDENTITY.generation
    assert "drawing" not in IDENTITY.generation  # greedy answers are drawn by nobody
    sampling = deciding_settings(GenerationSettings(do_sample=True, seed=5))
    assert (sampling["seed"], sampling["top_p"], sampling["temperature"]) == (5, 0.7, 0.95)


def test_rows_without_identity_are_refused(tmp_path):
    append(tmp_path, ROW)
    with pytest.raises(ConfigError, match=r"1 rows, but there is no predict_config.json"):
        opened(tmp_path, IDENTITY)


def test_rows_beyond_the_data_are_refused(tmp_path):
    opened(tmp_path, IDENTITY)
    append(tmp_path, dataclasses.replace(ROW, row=4))
    with pytest.raises(DataError, match=r"row 4 does not exist: the data has 4 rows"):
        opened(tmp_path, IDENTITY)


def test_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"`output_dir` is `.*file/run`, but it cannot be written"):
        opened(tmp_path / "file" / "run", IDENTITY)
    if os.geteuid() == 0:
        return
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        opened(tmp_path, IDENTITY)


def test_rows_from_before_there_were_strengths_count_as_tuned(tmp_path):
    opened(tmp_path, IDENTITY)
    append(tmp_path, ROW)
    file = tmp_path / "predict_config.json"
    values = json.loads(file.read_text())
    for name in ("prefix_strength", "adapter_scale", "checksum"):
        del values[name]
    file.write_text(json.dumps(values))
    assert opened(tmp_path, IDENTITY) == [ROW]
