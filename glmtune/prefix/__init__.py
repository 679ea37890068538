"""P-Tuning v2: the prefix encoder, its way into attention, and its files."""
