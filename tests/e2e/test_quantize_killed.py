"""`glmtune quantize` killed at any moment goes on where it stopped and ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from glmtune.errors import CheckpointError
from glmtune.quantization.files import quantize_on_load
from glmtune.quantization.files.write import REPORT_FILE, QuantizeJob, quantize_checkpoint
from glmtune.quantization.layers.finished_layers import FinishedLayer, FinishedLayers
from tests.warm.start import warm_python

KILLER = """
import os, signal, sys
from glmtune.quantization.layers.finished_layers import FinishedLayers
from glmtune.quantization.files.write import QuantizeJob, quantize_checkpoint
from pathlib import Path
put, left = FinishedLayers.put, [int(sys.argv[4])]
def counted(self, *given):
    put(self, *given)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
FinishedLayers.put = counted
rows = ((5, 9, 13, 7, 11, 6), (8, 6, 20, 21, 9))
quantize_checkpoint(QuantizeJob(sys.argv[1], sys.argv[2], Path(sys.argv[3]), calibration_rows=rows))
"""
ROWS = ((5, 9, 13, 7, 11, 6), (8, 6, 20, 21, 9))


def killed(source: Path, method: str, output: Path, layers: int) -> None:
    command = [*warm_python(), "-c", KILLER, str(source), method, str(output), str(layers)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize(("method", "layers", "reused"), [("int4-g32-asym", 3, 3), ("int4-gptq", 5, 4)])
def test_it_goes_on_after_a_kill(
    method: str, layers: int, reused: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has 2 blocks of 4 layers; a calibrated block that is not complete is done again."""
    whole = quantize_checkpoint(
        QuantizeJob(str(tiny_base), method, tmp_path / "whole", calibration_rows=ROWS)
    )
    assert whole.num_reused == 0
    killed(tiny_base, method, tmp_path / "out", layers)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.parts").glob("*.safetensors"))) == layers
    made = []
    quantize_in_chunks = quantize_on_load.quantize_in_chunks
    monkeypatch.setattr(
        quantize_on_load,
        "quantize_in_chunks",
        lambda *given, **named: (made.append(named["name"]), quantize_in_chunks(*given, **named))[1],
    )
    again = quantize_checkpoint(QuantizeJob(str(tiny_base), method, tmp_path / "out", calibration_rows=ROWS))
    assert again.num_reused >= reused
    assert len(made) == (8 - reused if method == "int4-g32-asym" else 0)
    assert again.report == whole.report
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "whole" / "config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert (tmp_path / "out" / REPORT_FILE).is_file()


def test_parts_of_another_run_are_not_used(tiny_base: Path, tmp_path: Path) -> None:
    killed(tiny_base, "int8", tmp_path / "out", 2)
    written = quantize_checkpoint(QuantizeJob(str(tiny_base), "int4", tmp_path / "out"))
    assert written.num_reused == 0
    assert written.report.method == "int4"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_part_is_made_again(tmp_path: Path) -> None:
    store = FinishedLayers(tmp_path / "parts", {"method": "int8"})
    store.put("layer", FinishedLayer({}, 2.0, 0.5, {"a.weight": b"\x00\x01"}))
    again = FinishedLayers(tmp_path / "parts", {"method": "int8"})
    found = again.get("layer")
    assert found == FinishedLayer({}, 2.0, 0.5, {"a.weight": b"\x00\x01"})
    assert again.num_reused == 1
    file = tmp_path / "parts" / "layer.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    assert again.get("layer") is None
    assert again.get("other") is None


def test_after_an_error_nothing_is_left(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CheckpointError("damaged")

    monkeypatch.setattr("glmtune.quantization.files.write._check_written", refuse)
    with pytest.raises(CheckpointError, match="damaged"):
        quantize_checkpoint(QuantizeJob(str(tiny_base), "int8", tmp_path / "out"))
    assert not list(tmp_path.iterdir())
