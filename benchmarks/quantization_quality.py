"""What every quantization method costs: SQNR by kind of layer, and perplexity of glm-tiny on held-out rows.

python benchmarks/quantization_quality.py --out benchmarks/results/quantization_quality

Writes OUT.json, OUT.md (a table) and OUT.png (a plot). Rows are those of glm-tiny's corpus that training
never saw; calibrated methods look at other rows. HQQ is measured where it is installed (``pip install hqq``).
The SQNR of all methods is that of the weights.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmtune.data.dataset import load_split
from glmtune.data.settings import DataSettings
from glmtune.loading import load_base, load_tokenizer
from glmtune.quantization.arithmetic.methods import METHODS, OPTIONAL, method_named
from glmtune.quantization.arithmetic.primitives import signal_and_noise, sqnr_db
from glmtune.quantization.layers.apply import quantize_model
from glmtune.quantization.layers.calibrate import quantize_calibrated
from glmtune.quantization.layers.linear import QuantizedLinear
from glmtune.quantization.layers.report import QuantizationReport
from glmtune.tiny.generated import resolve_generated


@dataclass(frozen=True)
class Quality:
    """What one method costs.

    Attributes:
        method: its name, or ``none``.
        bits_per_weight: of the quantized layers, scales and zero points included.
        sqnr_db: kind of layer → dB, of the weights.
        perplexity: per answer token, exp of the mean negative log-likelihood (natural log).
        divergence_nats: mean Kullback-Leibler divergence from the unquantized model, per answer token.
        changed_frac: answer tokens whose most probable prediction changed.
        seconds: that quantizing took.
    """

    method: str
    bits_per_weight: float
    sqnr_db: dict[str, float]
    perplexity: float
    divergence_nats: float
    changed_frac: float
    seconds: float


def rows_of(model: str, salt: str, count: int) -> list[tuple[list[int], list[int]]]:
    """Return (input ids, labels) of generated rows."""
    data = DataSettings(train_file=resolve_generated(f"generated:glm-tiny/{salt}/{count}"))
    split = load_split(data, "train", load_tokenizer(model))  # type: ignore[arg-type]
    return [(list(row["input_ids"]), list(row["labels"])) for row in split.rows]


@torch.no_grad()
def answer_log_probs(model: Any, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities ``[answer tokens, vocab]`` and the tokens that followed."""
    found, targets = [], []
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        following = torch.tensor(labels[1:])
        found.append(logits[following != -100].log_softmax(-1).half())
        targets.append(following[following != -100])
    return torch.cat(found), torch.cat(targets)


def weight_sqnr(model: Any, plain: Any) -> dict[str, float]:
    """Return kind of layer (the model's own name) → SQNR of its weights."""
    energies: dict[str, list[tuple[float, float]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = plain.get_submodule(name).weight.detach()
            energies.setdefault(name.rpartition(".")[2], []).append(
                signal_and_noise(weight, module.dequantized())
            )
    return {kind: sqnr_db(*(sum(part) for part in zip(*pairs))) for kind, pairs in energies.items()}  # noqa: B905


def quantize(model: Any, method: str, rows: list[list[int]]) -> QuantizationReport:
    """Quantize in memory by any method."""
    if method_named(method).calibrated:
        return quantize_calibrated(model, method, rows)
    return quantize_model(model, method)


def measure(source: str, methods: list[str], num_rows: int, num_calibration: int) -> list[Quality]:
    """Measure the unquantized model and every method."""
    held_out = rows_of(source, "validation", num_rows)
    calibration = [ids for ids, _ in rows_of(source, "train", num_calibration)]
    plain = load_base(source, dtype="float32", device="cpu")
    expected, targets = answer_log_probs(plain, held_out)
    picked = torch.arange(len(targets))
    qualities = [Quality("none", 16.0, {}, _perplexity(expected[picked, targets]), 0.0, 0.0, 0.0)]
    for method in methods:
        model = load_base(source, dtype="float32", device="cpu")
        start = time.perf_counter()
        report = quantize(model, method, calibration)
        seconds = time.perf_counter() - start
        found, _ = answer_log_probs(model, held_out)
        divergence = (expected.float().exp() * (expected.float() - found.float())).sum(-1).mean()
        replaced = [layer for layer in report.layers if layer.replaced]
        total = sum(layer.num_weights for layer in replaced)
        qualities.append(
            Quality(
                method=method,
                bits_per_weight=sum(item.bits_per_weight * item.num_weights for item in replaced) / total,
                sqnr_db=weight_sqnr(model, plain),
                perplexity=_perplexity(found[picked, targets]),
                divergence_nats=float(divergence),
                changed_frac=float((expected.argmax(-1) != found.argmax(-1)).float().mean()),
                seconds=seconds,
            )
        )
        sys.stderr.write(f"{method}: perplexity {qualities[-1].perplexity:.4f}\n")
    return qualities


def installed_methods() -> list[str]:
    """Return the methods of our own, and those of other packages that are installed."""
    found = [name for name, method in OPTIONAL.items() if importlib.util.find_spec(method.library)]
    missing = [name for name in OPTIONAL if name not in found]
    if missing:
        sys.stderr.write(f"left out, as their packages are not installed: {', '.join(missing)}\n")
    return [*METHODS, *found]


def _perplexity(log_probs: Tensor) -> float:
    return math.exp(-float(log_probs.float().mean()))


def table(qualities: list[Quality]) -> str:
    """Lay the figures out as Markdown."""
    kinds = list(dict.fromkeys(kind for quality in qualities for kind in quality.sqnr_db))
    head = ["method", "bits per weight", *(f"{kind} SQNR (dB)" for kind in kinds)]
    head += ["perplexity", "KL (nats per 1000 tokens)", "predictions changed (%)", "seconds"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for item in qualities:
        cells = [item.method, f"{item.bits_per_weight:.2f}"]
        cells += [f"{item.sqnr_db[kind]:.2f}" if kind in item.sqnr_db else "" for kind in kinds]
        cells += [f"{item.perplexity:.4f}", f"{1000 * item.divergence_nats:.2f}"]
        cells += [f"{100 * item.changed_frac:.2f}", f"{item.seconds:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


MARKERS = "osD^v<>PXph*d"


def plot(qualities: list[Quality], path: Path) -> None:
    """Draw bits per weight against what they cost: all methods, and those of four bits by themselves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (whole, near) = pyplot.subplots(1, 2, figsize=(11, 5), width_ratios=(2, 3))
    by_cost = sorted(qualities[1:], key=lambda item: -item.divergence_nats)
    for place, item in enumerate(by_cost):
        cost = 1000 * item.divergence_nats
        style = {"marker": MARKERS[place % len(MARKERS)], "color": f"C{place % 10}", "s": 60}
        label = f"{item.method}: {item.bits_per_weight:.2f} bits, {cost:.1f}"
        whole.scatter(item.bits_per_weight, cost, label=label, **style)
        if item.bits_per_weight < 6:
            near.scatter(item.bits_per_weight, cost, **style)
    whole.set_yscale("log")
    whole.set_ylabel("KL divergence from float32 (nats per 1000 tokens)")
    near.set_title("four bits, linear")
    for axes in (whole, near):
        axes.set_xlabel("bits per weight, scales included")
        axes.grid(alpha=0.3)
    near.legend(*whole.get_legend_handles_labels(), fontsize=8)
    figure.suptitle("glm-tiny, held-out rows: what quantization costs")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", default="glm-tiny")
    parser.add_argument("--methods", nargs="+", default=installed_methods(), choices=[*METHODS, *OPTIONAL])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--calibration-rows", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:  # generated rows are made under the working folder
        os.chdir(folder)
        qualities = measure(arguments.source, arguments.methods, arguments.rows, arguments.calibration_rows)
        os.chdir("/")
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    for library in {OPTIONAL[name].library for name in arguments.methods if name in OPTIONAL}:
        machine += f", {library} {importlib.metadata.version(library)}"
    facts = {"source": arguments.source, "rows": arguments.rows, "machine": machine}
    facts |= {"calibration_rows": arguments.calibration_rows}
    content = {**facts, "methods": [asdict(item) for item in qualities]}
    out.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    text = table(qualities)
    title = f"# What quantization costs: {arguments.source}, {arguments.rows} held-out rows\n\n"
    command = f"`python benchmarks/quantization_quality.py {' '.join(sys.argv[1:])}`; {machine}\n\n"
    out.with_suffix(".md").write_text(title + command + text + "\n")
    plot(qualities, out.with_suffix(".png"))
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
