"""`model.chat` and `model.stream_chat`, as the releases' READMEs show them.

``chat.py`` is where both begin; ``stream.py`` decodes one token at a time. Many prompts at once are the
matter of `glmtune.inference`, prompt texts that of `glmtune.models.templates`.
"""
