"""Benchmarks of a user's own, described in a YAML file: `glmtune eval benchmark=my.yaml`.

``description.py`` says what the file may hold, ``rows.py`` reads the questions it names, ``prompts.py``
renders them, ``reading.py`` reads answers, ``benchmark.py`` makes the `Benchmark` that everything else
knows, and ``check.py`` shows what it comes to. ``asking.py`` asks benchmarks that ship in a user's words.
Nothing in such a file is run but Jinja, in jinja2's sandbox.
"""
