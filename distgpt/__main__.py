"""`python -m distgpt COMMAND ...`: the same as `distgpt COMMAND ...`."""

from distgpt.cli import main

main()
