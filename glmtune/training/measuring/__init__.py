"""What a run measures of the base's answers, and what it says of that.

`retention` is the callback: what the base answers, asked once, and what the tuned model answers at every
evaluation. `files` is what it keeps in the run folder, `report` what becomes of it in results and model card,
`picture` the plot.
"""
