"""The report of a quantization as a table."""

from __future__ import annotations

from rich.table import Table

from glmtune.quantization.layers.report import QuantizationReport


def report_table(report: QuantizationReport) -> Table:
    """Lay out a report, one line per kind of layer.

    Args:
        report: of a model.
    """
    table = Table(
        title=f"quantized by {report.method}; bits per weight with scales, SQNR of {report.measured}",
        title_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    for name in ("replaced", "skipped", "bits", "SQNR dB"):
        table.add_column(name, justify="right")
    table.add_column("notes")
    reasons = {layer.kind: layer.reason for layer in report.layers if not layer.replaced}
    worst = {layer.name: layer.sqnr_db for layer in report.layers}
    for kind in report.kinds():
        lowest = worst.get(kind.worst)
        layer = kind.worst.partition(".layers.")[2].partition(".")[0]
        notes = [f"lowest {lowest:.2f}" + (f", layer {layer}" if layer else "")] if lowest is not None else []
        notes += [reasons[kind.kind]] if kind.num_skipped else []
        table.add_row(
            kind.kind,
            str(kind.num_replaced),
            str(kind.num_skipped),
            f"{kind.bits_per_weight:.2f}",
            "-" if kind.sqnr_db is None else f"{kind.sqnr_db:.2f}",
            "; ".join(notes),
        )
    return table
