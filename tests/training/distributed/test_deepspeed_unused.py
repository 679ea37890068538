"""DeepSpeed is not imported by runs that do not use it, and is found by those that do."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("deepspeed")

PROBE = """
import sys
from torch import nn
from accelerate.utils.other import extract_model_from_parallel
from glmtune.training.distributed.deepspeed_engine import leave_unimported
leave_unimported()
model = nn.Linear(2, 2)
assert extract_model_from_parallel(nn.DataParallel(model)) is model
assert "deepspeed" not in sys.modules, "imported for nothing"
import deepspeed
class Engine(deepspeed.DeepSpeedEngine):
    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module
    def __getattr__(self, name):
        return nn.Module.__getattr__(self, name)
assert extract_model_from_parallel(Engine(model)) is model, "an engine is known for what it is"
"""


def test_unwrapping_a_model_imports_nothing_and_knows_engines_once_there_are_some():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_a_prefix_leaves_it_out(tmp_path):
    probe = (
        "import sys; from glmtune.cli import main;"
        "code = main(['train', '+recipe=ptuning_official', 'trainer.max_steps=1', 'retention=null',"
        f" 'data.max_train_samples=16', 'data.max_eval_samples=2', 'output_dir={tmp_path / 'run'}']);"
        "sys.exit('imported' if 'deepspeed' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "all_results.json").is_file()
