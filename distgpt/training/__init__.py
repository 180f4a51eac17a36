"""What happens in a training run: the optimizer step, its state, and what is logged about it."""
