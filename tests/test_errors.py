"""How commands end: exit codes, error lines and the last output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distgpt.errors import (
    ConfigError,
    RuntimeEnvironmentError,
    UserError,
    explain_error,
    one_line,
    pluralize,
    short_reason,
)
from tests.conftest import REPO, environment


def run_code(code: str, shell: str = "exec {}", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python code through a shell command, in which `{}` stands for it."""
    line = shell.format(f'"{sys.executable}" -c "$CODE"')
    return subprocess.run(
        ["bash", "-c", line],
        env=environment(CODE=code, PYTHONUNBUFFERED="", **variables),
        capture_output=True,
        text=True,
        check=False,
    )


COMMAND = """
from distgpt.errors import ConfigError, exit_process, run_command
def main(arguments):
    print("x" * {characters})
    {end}
exit_process(run_command(main))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("return 75", 75)])
@pytest.mark.parametrize("variables", [{}, {"RANK": "0"}])
def test_a_full_disk_at_exit_neither_changes_the_code_nor_prints(
    end: str, code: int, variables: dict[str, str]
) -> None:
    done = run_code(COMMAND.format(characters=10, end=end), "exec {} >/dev/full", **variables)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("characters", [10, 1_000_000])
@pytest.mark.parametrize("variables", [{}, {"RANK": "0"}])
def test_a_closed_pipe_is_no_error(characters: int, variables: dict[str, str]) -> None:
    """Whether it is noticed while printing or at exit."""
    code = COMMAND.format(characters=characters, end="pass")
    done = run_code("import time; time.sleep(0.5)\n" + code, "set -o pipefail; {} | true", **variables)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("end", ["pass", "return 75"])
def test_a_closed_stdout_neither_changes_the_code_nor_prints(end: str) -> None:
    done = run_code(COMMAND.format(characters=10, end=end), "exec {} >&-")
    assert (done.returncode, done.stderr) == (75 if "75" in end else 0, "")


def test_help_into_a_closed_pipe_is_no_error() -> None:
    line = f'set -o pipefail; "{sys.executable}" -m distgpt.config --help | true'
    done = subprocess.run(
        ["bash", "-c", line], cwd=REPO, env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_only_a_rank_of_several_processes_skips_finalization() -> None:
    code = (
        "import atexit\natexit.register(print, 'finalized')\nfrom distgpt.errors import exit_process\nexit_process(3)"
    )
    alone, rank = run_code(code), run_code(code, RANK="0")
    assert (alone.returncode, alone.stdout) == (3, "finalized\n")
    assert (rank.returncode, rank.stdout) == (3, "")


def test_user_errors_become_lines_and_bugs_keep_their_traceback() -> None:
    done = run_code(COMMAND.format(characters=1, end="raise ConfigError('a: got 1\\nb: got 2')"))
    assert (done.returncode, done.stderr) == (2, "distgpt: error: a: got 1\ndistgpt: error: b: got 2\n")
    bug = run_code(COMMAND.format(characters=1, end="raise KeyError('x')"))
    assert bug.returncode == 1 and "Traceback" in bug.stderr


@pytest.mark.parametrize(
    ("on_all_ranks", "variables", "expected"),
    [
        (False, {}, "distgpt: error: wrong\n"),
        (True, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "distgpt: error: wrong\n"),
        (True, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, ""),
        (False, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "distgpt: error: rank 1: wrong\n"),
        (True, {"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0"}, "distgpt: error: wrong\n"),
    ],
)
def test_an_error_on_all_ranks_is_printed_once_per_machine(
    on_all_ranks: bool, variables: dict[str, str], expected: str
) -> None:
    code = COMMAND.format(characters=1, end=f"raise ConfigError('wrong', on_all_ranks={on_all_ranks})")
    done = run_code(code, **variables)
    assert (done.returncode, done.stderr) == (2, expected)


def test_errors_that_users_can_fix_are_explained() -> None:
    assert explain_error(ConfigError("text")) == (2, "text")
    code, text = explain_error(FileNotFoundError(2, "No such file or directory", "a")) or (0, "")
    assert (code, text) == (6, "a: No such file or directory; fix this and run the same command again")
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate\nmore")):
        code, text = explain_error(error) or (0, "")
        assert code == RuntimeEnvironmentError.exit_code and "lower batch_size (keeping global_batch_size)" in text
        assert "\n" not in text
    assert explain_error(RuntimeError("shape mismatch")) is None
    assert issubclass(RuntimeEnvironmentError, UserError)


def test_texts() -> None:
    assert short_reason(ValueError("first\nsecond")) == "first" and short_reason(KeyError()) == "KeyError"
    assert one_line("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert [pluralize(n, "rank") for n in (0, 1, 1000)] == ["0 ranks", "1 rank", "1,000 ranks"]
