"""How a run starts where it does not start from nothing, nor just goes on.

`changes` tells which settings differ from those a run began with, and which of them may; `optimizer_state`
puts what a checkpoint holds under today's settings; `fitting` compares a checkpoint with what is to be
trained; `tuned_before` begins a new run from a saved prefix, adapter or model. Start with `changes`.
"""
