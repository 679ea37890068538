"""Triton's kernels equal the plain path; without a GPU they run in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.layers.linear import QuantizedLinear

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (pip install triton, on Linux)",
)

SHAPES = [(1, 96, 33), (5, 64, 16), (33, 130, 70)]
"""Rows, input features (the last group is a part of one), output features."""
METHOD_NAMES = ("int8", "int4", "int4-g32", "int4-g64-asym", "int4-g128-asym")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def compare(method: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Product and input gradient of one layer against those of its dequantized weight."""
    from glmtune.quantization.kernels.triton_kernels import TritonProduct

    rows, columns, out = shape
    torch.manual_seed(rows)
    chosen = METHODS[method]
    layer = QuantizedLinear(columns, out, layout=chosen.layout(method))
    layer.put(chosen.quantize(torch.randn(out, columns)))
    layer = layer.to(device)
    weight = layer.dequantized()
    product = TritonProduct(layer)
    inputs = {"contiguous": torch.randn(rows, columns), "strided": torch.randn(rows, 2 * columns)[:, ::2]}
    inputs |= {"row stride": torch.randn(rows, columns + 3)[:, :columns]}
    for name, x in inputs.items():
        x = x.to(device, dtype)
        close(product(x), x.float() @ weight.T, dtype, name)
    dy = torch.randn(rows, out).to(device, dtype)
    close(product.input_gradient(dy), dy.float() @ weight, dtype, "gradient")


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    assert found.dtype == dtype
    limit = TOLERANCE[dtype] * float(expected.abs().max())
    difference = float((found.float() - expected).abs().max())
    assert difference <= limit, (name, difference, limit)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where the kernels run themselves")
def test_in_the_interpreter() -> None:
    """One process for all cases: Triton decides at its import whether to interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(METHOD_NAMES) * len(SHAPES) * 3} cases, layer and gradient equal" in done.stdout


@needs_triton
def test_kernels_that_fail_or_err_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from glmtune.quantization.kernels import dispatch, triton_kernels

    layer = QuantizedLinear(64, 48, layout=METHODS["int4"].layout("int4"))
    kernel = dispatch.TritonKernel(device="cpu")
    dispatch._triton_problem.cache_clear()
    monkeypatch.setattr(triton_kernels.TritonProduct, "__call__", lambda self, x: x.new_zeros(len(x), 48))
    monkeypatch.setattr(
        triton_kernels.TritonProduct, "input_gradient", lambda self, dy: dy.new_zeros(len(dy), 96)
    )
    assert kernel.refusal(layer, torch.float32) == "Triton's results are wrong here"
    dispatch._triton_problem.cache_clear()
    monkeypatch.setattr(triton_kernels.TritonProduct, "__call__", lambda self, x: 1 // 0)
    assert "Triton fails here (ZeroDivisionError" in kernel.refusal(layer, torch.float32)
    dispatch._triton_problem.cache_clear()


def test_without_triton_other_kernels_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    from glmtune.quantization.kernels import dispatch

    monkeypatch.setitem(sys.modules, "glmtune.quantization.kernels.triton_kernels", None)
    dispatch._triton_problem.cache_clear()
    layer = QuantizedLinear(64, 48, layout=METHODS["int4"].layout("int4"))
    assert "pip install triton" in dispatch.TritonKernel(device="cpu").refusal(layer, torch.float32)
    dispatch._triton_problem.cache_clear()


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_on_a_gpu(method: str, dtype: torch.dtype) -> None:
    for shape in (*SHAPES, (512, 4096, 4096)):
        compare(method, shape, dtype, "cuda")


def interpreted() -> None:
    """Run every case on the CPU, then a layer with its gradient through autograd."""
    from glmtune.quantization.kernels import dispatch

    num_cases = 0
    for method in METHOD_NAMES:
        for shape in SHAPES:
            for dtype in TOLERANCE:
                compare(method, shape, dtype, "cpu")
                num_cases += 1
    method = METHODS["int4-g32-asym"]
    layer = QuantizedLinear(64, 48, layout=method.layout("int4-g32-asym"))
    layer.put(method.quantize(torch.randn(48, 64)))
    kernel = dispatch.TritonKernel(device="cpu")
    assert kernel.refusal(layer, torch.float32) == ""
    assert "inputs are float64" in kernel.refusal(layer, torch.float64)
    assert "the layer is on cpu" in dispatch.TritonKernel().refusal(layer, torch.float32)
    many = torch.zeros(dispatch.TRITON_MAX_ROWS + 1, 64)
    assert kernel.prepared(layer).multiply(many) is None
    results = []
    for product in (None, kernel.prepared(layer)):
        layer.use(product)
        x = torch.linspace(-1, 1, 4 * 64).reshape(2, 2, 64).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-4)
    sys.stdout.write(f"{num_cases} cases, layer and gradient equal\n")


if __name__ == "__main__":
    interpreted()
