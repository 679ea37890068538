"""Architectures, checkpoints, tokenizers and chat templates of the GLM family."""
