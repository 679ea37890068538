"""Scores for generated text."""
