"""The ranks of a run, how the model is parallelized over them, and what that costs."""
