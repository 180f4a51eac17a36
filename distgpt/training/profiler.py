"""Profile some training steps: a trace for Perfetto, and a table of the most expensive operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from torch import profiler

from distgpt.distributed.context import DistributedContext

PROFILE_DIR = "profile"
MAX_OPERATIONS = 30
"""Rows in operations.txt."""


class StepProfiler:
    """Profiles the steps from steps[0] to steps[1] of a training loop; does nothing where `steps` is None.

    Each rank writes `profile/trace-rank-N.json.gz`, which ui.perfetto.dev opens; rank 0 also writes
    `profile/operations.txt`. The step before the first profiled one warms the profiler up, where there is one.

        with StepProfiler(...) as profiler:
            for step in range(first_step + 1, last_step + 1):
                ...
                profiler.step_done()
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        first_step: int,
        output_dir: Path,
        context: DistributedContext,
        print: Callable[[str], None],
        last_step: int,
    ) -> None:
        """`first_step` is the number of steps already done: the loop starts with the next one and ends with
        `last_step`. `print` receives a line about the outcome.
        """
        self._folder, self._context, self._print = output_dir / PROFILE_DIR, context, print
        self._profiler: profiler.profile | None = None
        if steps is None:
            return
        first = max(steps[0], first_step + 1)
        self._last = min(steps[1], last_step)
        self._step = first_step
        if self._last < first:
            return
        skip = first - first_step - 1
        warmup = min(1, skip)
        self._profiler = profiler.profile(
            schedule=profiler.schedule(wait=skip - warmup, warmup=warmup, active=self._last - first + 1, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> StepProfiler:
        if self._profiler is not None:
            self._profiler.__enter__()  # type: ignore[no-untyped-call]
        return self

    def step_done(self) -> None:
        """Call after each step of the loop."""
        if self._profiler is None:
            return
        self._step += 1
        if self._step == self._last:
            self.__exit__(None, None, None)
        else:
            self._profiler.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what was profiled, also where the loop ended early."""
        if self._profiler is not None:
            self._profiler.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
            self._profiler = None

    def _write(self, recorded: profiler.profile) -> None:
        """Write this rank's trace and, on rank 0, the table of operations. A failure does not end the run."""
        try:
            self._folder.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(self._folder / f"trace-rank-{self._context.rank}.json.gz"))
            if self._context.is_rank0:
                device_type = "cuda" if self._context.device.type == "cuda" else "cpu"
                sort_key = f"self_{device_type}_time_total"
                table = recorded.key_averages().table(sort_by=sort_key, row_limit=MAX_OPERATIONS)
                (self._folder / "operations.txt").write_text(table, encoding="utf-8")
        except (OSError, RuntimeError) as error:
            self._print(f"warning: {self._folder}: {error}; no profile was written")
        else:
            self._print(f"profile {self._folder}: operations.txt, and trace-rank-*.json.gz for ui.perfetto.dev")
