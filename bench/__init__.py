"""What distgpt is measured with: `python -m bench.speed`, and scripts to run by themselves."""
