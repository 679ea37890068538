"""Processors without AVX-512: PyTorch's products of their instruction set, chosen when the program runs.

PyTorch decides once per process which instructions it uses, and ``ATEN_CPU_CAPABILITY`` lowers that: so its code
for AVX2, and that for any processor (as on ARM, where NEON's stands in its place), run in a process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import json
import torch
from glmtune.loading import load_model
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.kernels.int4pack import panel_outputs

found = {"capability": torch.backends.cpu.get_cpu_capability(), "panel": panel_outputs()}
ids = torch.tensor([[5, 17, 300, 42, 9, 11]])
for method in ("int8", "int4", "int4-g32", "int4-g64-asym"):
    model = load_model("glm-tiny", quantization=method, dtype="bfloat16", device="cpu")
    with torch.no_grad():
        stored = {n: t.clone() for n, t in model.state_dict().items()}
        fast = model(ids).logits.float()
        used = prepare_for_inference(model, embeddings="int8")
        rounded = model(ids).logits.float()
        prepare_for_inference(model)
        model.bfloat16()  # a cast takes the products away
        plain = model(ids).logits.float()
        again = load_model("glm-tiny", quantization=method, dtype="bfloat16", device="cpu")
        again.bfloat16()
        expected = again(ids).logits.float()
    largest = float(expected.abs().max())
    found[method] = {
        "used": used,
        "error": float((fast - expected).abs().max()) / largest,
        "error_rounded": float((rounded - plain).abs().max()) / largest,
        "is_kept": all(torch.equal(t, stored[n]) for n, t in again.state_dict().items()),
    }
print(json.dumps(found))
"""


@pytest.mark.parametrize(("capability", "panel"), [("avx2", 32), ("default", None)])
def test_numbers_and_choice(capability: str, panel: int | None) -> None:
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "GLMTUNE_NATIVE_KERNELS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["capability"].lower() == capability
    assert found["panel"] == panel
    for method in ("int8", "int4", "int4-g32", "int4-g64-asym"):
        got = found[method]
        kernel = "int8pack" if method == "int8" else "int4pack"
        # The head of glm-tiny is INT8 whatever the others are.
        assert got["used"] == ({kernel: 37} if kernel == "int8pack" else {kernel: 36, "int8pack": 1})
        assert got["error"] < 0.03  # bfloat16 scales and outputs over six layers
        assert got["error_rounded"] < 0.03
        assert got["is_kept"]
