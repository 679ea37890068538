"""The benchmarks: their data layouts, prompts, extraction rules and averages.

``make_task(benchmark, *, protocol=None, split=None, data_dir=None, is_chat=True, num_fewshot=None,
subjects=None, limit=None) -> Task`` and ``BENCHMARKS`` (name to benchmark) will come from here.
"""
