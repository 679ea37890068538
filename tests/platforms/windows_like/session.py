"""One session in one process: check, tune twice, predict, quantize twice, evaluate, compare; each code is printed."""

from __future__ import annotations

import json
import sys

from glmtune.cli import main

SMALL = ("retention=null", "trainer.max_steps=2", "trainer.save_steps=1", "data.max_train_samples=16")
SMALL += ("data.max_eval_samples=4", "model.device=cpu")
WORKERS = (
    "data.num_workers=2",
    "data.cache=always",
    "data.cache_dir=rows",
    "trainer.dataloader_num_workers=1",
)
EVAL = ("eval", "benchmark=ceval", "benchmark.limit=1", "num_threads=1")
COMMANDS = (
    ("train", "+recipe=ptuning", "data=ads", "output_dir=runs/ads", *SMALL, *WORKERS),
    ("train", "+recipe=ptuning", "data=ads", "output_dir=runs/ads", *SMALL, "resume=never"),
    (
        "predict",
        "data=ads",
        "prefix_path=runs/ads/last",
        "data.max_predict_samples=2",
        "generation.max_new_tokens=8",
    ),
    ("quantize", "bits=8", "output_dir=model"),
    ("quantize", "bits=4", "output_dir=model", "overwrite=true"),
    (*EVAL, "output_dir=runs/plain"),
    (*EVAL, "output_dir=runs/int4", "model=./model"),
    (*EVAL, "output_dir=runs/int4", "model=./model", "resume=false"),
    ("compare", "runs=[runs/plain,runs/int4]"),
)

# A spawned worker of a data loader imports this file again.
if __name__ == "__main__":
    for words in COMMANDS:
        code = main(words)
        sys.stdout.write(f"\n== {json.dumps([*words[:1], code])}\n")
        sys.stdout.flush()
        if code not in ((0, 3, 4) if words[0] == "compare" else (0,)):
            sys.exit(code)
