"""What tuning leaves of the base: measured on prompts that are not of the task, and kept by replay.

Prompts and the base's own answers to them, made once before the first step, are what both are built on. See
``docs/retention.md``.
"""
