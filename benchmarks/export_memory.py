"""Measure the memory that an export takes, beyond Python and its libraries.

python benchmarks/export_memory.py /tmp/medium --format transformers official --shard-mib 64
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from glmtune.export.export import export
from glmtune.export.source import ExportJob
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.checkpoints.names import name_table
from glmtune.models.checkpoints.shards import read_records
from glmtune.models.load import load_config
from glmtune.models.releases.families import detect_family


def layer_bytes(folder: Path) -> int:
    """Return the stored size of one block."""
    records = read_records(folder)
    config = load_config(folder, folder, detect_family(folder, read_config(folder)))
    names = [entry.official for entry in name_table(config) if ".layers.0." in entry.official]
    return sum(records[name].num_bytes for name in names)


def resident_bytes() -> int:
    """Return the memory this process holds now, file pages that are only mapped left out."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize()


def measure(job: ExportJob, warm_up: Path) -> dict[str, float]:
    """Export in a forked process, after a tiny export has pulled in lazy code, and return the figures."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            with tempfile.TemporaryDirectory() as folder:
                export(
                    ExportJob(
                        str(warm_up), job.format, Path(folder) / "out", None, None, None, None, 2**20, False
                    )
                )
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter()
            exported = export(job)
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            figures = {"peak_bytes": peak - before, "weight_bytes": exported.num_bytes, "seconds": seconds}
            os.write(writer, json.dumps(figures | {"max_difference": exported.max_difference}).encode())
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(writer)
    os.wait()
    with os.fdopen(reader) as stream:
        return json.loads(stream.read() or "{}")


def main() -> None:
    """Print one line per format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", nargs="+", default=["transformers", "official"])
    parser.add_argument("--shard-mib", type=int, default=2048)
    parser.add_argument(
        "--warm-up", type=Path, required=True, help="a tiny checkpoint of the same generation"
    )
    parser.add_argument("--out", type=Path, required=True, help="where the export goes; must be free")
    options = parser.parse_args()
    for form in options.format:
        out = options.out / form
        job = ExportJob(
            str(options.folder), form, out, None, None, None, None, options.shard_mib * 2**20, False
        )
        figures = measure(job, options.warm_up)
        mebibytes = {name: value / 2**20 for name, value in figures.items() if name.endswith("_bytes")}
        mebibytes["layer_bytes"] = layer_bytes(options.folder) / 2**20
        shown = ", ".join(
            f"{name.removesuffix('_bytes')} {value:,.0f} MiB" for name, value in mebibytes.items()
        )
        print(f"{form}: {shown}, {figures['seconds']:.0f} s, difference {figures['max_difference']:.1e}")


if __name__ == "__main__":
    main()
