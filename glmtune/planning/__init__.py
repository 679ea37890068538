"""What a training run will need before it starts: memory by part, settings that fit, time per epoch."""
