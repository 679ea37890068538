"""Imported once in a dry run by the process that all parts are forked from."""

import transformers  # noqa: F401

import benchmarks.gpu.decode
import benchmarks.gpu.machine
import benchmarks.gpu.marked_tests
import benchmarks.gpu.throughput
import benchmarks.gpu.tune  # noqa: F401
from glmtune.training import session, trainer  # noqa: F401
from glmtune.training.distributed import sharded_loading  # noqa: F401
