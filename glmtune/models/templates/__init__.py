"""Prompt templates: messages to text and ids, and decoded output back to answers.

Start with ``base.py`` (what a template is), then ``renderer.py`` (which release has which); the templates
are in ``rounds.py`` (ChatGLM-6B, ChatGLM2, CodeGeeX2), ``roles.py`` (ChatGLM3, GLM-4) and ``folder.py`` (the
Jinja template of a folder in transformers' format; ``marked.py`` finds the answers in what it renders). Text
to ids is the tokenizers' matter, see `glmtune.models.tokenizers`.
"""
