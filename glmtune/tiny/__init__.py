"""The embedded model glm-tiny: its corpus, tokenizer and rebuild."""
