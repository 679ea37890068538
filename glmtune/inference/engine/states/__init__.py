"""The keys and values of a batch in which rows of all lengths generate side by side, and their attention.

Begin with `batch_states`: what the engine calls before, in and after a forward pass. `rows` says what a row
brings along, `bank` holds rows of about one length, `partition` decides which rows those are, `bank_step`
attends to a bank's columns in one pass, and `decomposed` to parts of a row's context, merging the results.
"""
