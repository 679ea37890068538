"""The benchmarks: their data layouts, prompts, extraction rules and averages."""
