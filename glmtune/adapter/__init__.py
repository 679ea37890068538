"""Low-rank adapters as PEFT saves them: what a file may ask for, and putting one into a model.

Begin with ``load.py``. What trains them is `glmtune.training.adapt`; merging is `glmtune.export`.
"""

from glmtune.adapter.load import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_sha256,
    check_adapter,
    find_adapter,
    fitting_weights,
    load_adapter,
    set_scale,
)

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILE",
    "adapter_sha256",
    "check_adapter",
    "find_adapter",
    "fitting_weights",
    "load_adapter",
    "set_scale",
]
