"""What users of the releases have in their scripts, on glmtune's models.

`arguments.py` is the list of what people hand to ``from_pretrained``, each obeyed, without effect here, or
refused with what to write instead; begin there. `auto_classes.py` lets transformers' Auto classes give
glmtune's models for official folders; `chat_pipeline.py` answers the dictionaries of ModelScope's pipeline.
"""
