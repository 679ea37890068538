"""What `scripts/gpu_check.sh` runs: the tests of a GPU and its figures, each part in a process of its own.

Begin with `check.py` (the order, the time, the report); `parts.py` is the list; the other modules are the
programs of the parts, which also run alone: `python -m benchmarks.gpu.decode --method int4 --device cuda`.
"""
