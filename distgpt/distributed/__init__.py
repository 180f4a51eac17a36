"""The processes of a run: who they are, how the model is parallelized over them, and what that costs."""
