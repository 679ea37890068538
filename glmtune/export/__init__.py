"""Checkpoints for other tools: written tensor by tensor, compared with their source before they appear."""
