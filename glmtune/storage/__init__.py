"""What a run leaves on disk: whole files, journals that survive a kill, locks that die with their holder.

A reader starts with `files` (how anything gets its name), then `lock` (who may write; `holder`) and
`journal` (answers, line by line). `exchange` is the one step by which a folder takes the place of another.
`renames` and `names` are what Windows asks for.
"""
