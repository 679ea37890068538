"""Benchmarks beyond the four of the model card, each in a file with its paper and its published protocol.

`cmmlu.py` and `mmlu_pro.py` are exams, `gsm_symbolic.py` and `competition_math.py` ask for a number or
formula, `ifeval.py` checks instructions by rules (`instructions.py`), `longbench.py` grades answers about
long texts. Read `cmmlu.py` first, the shortest; what all of them are made of is in
`evaluation.benchmarks.benchmark`.
"""
