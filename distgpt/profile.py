"""Where the time of some steps goes: a trace for Perfetto, and a table by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from torch import profiler

from distgpt.world import World

Item = TypeVar("Item")

FOLDER = "profile"
TOP_OPERATIONS = 30


def profiled(
    items: Iterable[Item],
    following: int,
    steps: tuple[int, int] | None,
    output_dir: Path,
    world: World,
    say: Callable[[str], None],
) -> Iterator[Item]:
    """Yield `items`, one a training step from `following` on, and record what is done between two of them.

    Of the steps from steps[0] to steps[1] each rank writes `profile/trace-rank-N.json.gz`, which ui.perfetto.dev opens,
    and rank 0 `profile/operations.txt`. The step before them warms the profiler up, where there is one.
    """
    first, last = steps or (0, 0)
    first = max(first, following)
    if last < first:
        yield from items
        return
    warm_up = min(1, first - following)
    wait = first - following - warm_up
    with profiler.profile(
        schedule=profiler.schedule(wait=wait, warmup=warm_up, active=last - first + 1, repeat=1),
        on_trace_ready=lambda found: say(write(found, output_dir / FOLDER, world)),
    ) as recorder:
        for number, item in enumerate(items):
            if number > 0:
                recorder.step()
            yield item


def write(found: profiler.profile, folder: Path, world: World) -> str:
    """Write a rank's trace and, on rank 0, the operations that took most of the time; returns what to tell people."""
    try:
        folder.mkdir(exist_ok=True)
        found.export_chrome_trace(str(folder / f"trace-rank-{world.rank}.json.gz"))
        if world.is_first:
            time = f"self_{'cuda' if world.device.type == 'cuda' else 'cpu'}_time_total"
            table = found.key_averages().table(sort_by=time, row_limit=TOP_OPERATIONS)
            (folder / "operations.txt").write_text(table, encoding="utf-8")
    except (OSError, RuntimeError) as error:  # no reason to end a run
        return f"warning: {folder}: {error}; no profile was written"
    return f"profile {folder}: operations.txt, and trace-rank-*.json.gz for ui.perfetto.dev"
