"""From a task and a backend to one answer per question, on disk at once and continued after a kill.

Begin with `runner`; it passes `data_parallel` (which questions are this process's), `run_folder` (the
journals), `same_questions` (which answers there are to the questions asked now), `fitting` (prompts that fit
the context), `failed_questions` (what a backend could not answer) and `progress`. `saved_answers` takes
completions from a file instead of a model. What the answers are worth is judged in `evaluation.reporting`.
"""
