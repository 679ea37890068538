"""One flat, runnable flow per command; the only code that knows Hydra."""
