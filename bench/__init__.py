"""Benchmarks: `python -m bench.speed` compares distgpt with other trainers; the other modules are smaller scripts."""
