"""Summarize the outcomes of `python -m bench.speed`, and print the summary as a table."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from bench.contestants import Outcome, RunSettings
from distgpt.training.metrics import peak_tflops


def speeds_after_warmup(outcomes: list[Outcome], settings: RunSettings, num_warmup_steps: int) -> list[float]:
    """Tokens per second of each printed line after the warm-up: the mean of the steps since the previous line."""
    tokens, speeds = settings.prepared.shape.tokens, []
    for outcome in outcomes:
        previous_steps = [0.0, *(row["step"] for row in outcome.rows)]
        speeds += [
            tokens / row["seconds"]
            for row, previous_step in zip(outcome.rows, previous_steps, strict=False)
            if previous_step >= num_warmup_steps
        ]
    return speeds


def summarize(
    name: str, outcomes: list[Outcome], settings: RunSettings, num_warmup_steps: int, peak: dict[str, float]
) -> dict[str, Any]:
    """A contestant's figures over all rounds. `peak` is the speed of large matmuls in TFLOP/s by precision."""
    completed = [outcome for outcome in outcomes if outcome.failure is None]
    if not completed:
        return {"contestant": name, "failure": outcomes[0].failure}
    speeds = speeds_after_warmup(completed, settings, num_warmup_steps)
    speed = statistics.median(speeds)
    low, _, high = statistics.quantiles(speeds, n=4, method="inclusive") if len(speeds) > 1 else speeds * 3
    on_gpu, precision = torch.cuda.is_available(), completed[0].precision
    tflops = speed * settings.prepared.flops_per_token / 1e12
    device_tflops = tflops / (settings.world_size if on_gpu else 1)  # CPU ranks share one machine
    data_sheet = peak_tflops(torch.device("cuda"), precision) if on_gpu else None
    checkpoint_seconds = [outcome.checkpoint_seconds for outcome in completed if outcome.checkpoint_seconds is not None]
    return {
        "contestant": name,
        "precision": precision,
        "tokens_per_second": speed,
        "quartiles": [low, high],
        "tflops": tflops,
        "matmul_tflops": peak[precision],
        "mfu_matmul": device_tflops / peak[precision],
        "mfu_data_sheet": device_tflops / data_sheet if data_sheet else None,
        "peak_mib": max(outcome.peak_mib for outcome in completed),
        "first_step_seconds": [outcome.first_step_seconds for outcome in completed],
        "loader_seconds": settings.prepared.loader_seconds if checkpoint_seconds else None,
        "checkpoint_seconds": statistics.median(checkpoint_seconds) if checkpoint_seconds else None,
        "failures": [outcome.failure for outcome in outcomes if outcome.failure is not None],
        "rounds": [outcome.rows for outcome in completed],
    }


def add_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add distgpt's speed as a multiple of each contestant's, on default settings and in fp32."""
    speeds = {row["contestant"]: row.get("tokens_per_second") for row in rows}
    for row in rows:
        for key, name in (("distgpt_ratio", "distgpt"), ("distgpt_fp32_ratio", "distgpt fp32")):
            distgpt_speed, speed = speeds.get(name), speeds[row["contestant"]]
            row[key] = distgpt_speed / speed if distgpt_speed and speed else None
    return rows


COLUMNS = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "middle half": lambda row: "-".join(f"{speed:,.0f}" for speed in row["quartiles"]),
    "distgpt": lambda row: f"{row['distgpt_ratio']:.2f}x",
    "distgpt fp32": lambda row: f"{row['distgpt_fp32_ratio']:.2f}x",
    "TFLOPS": lambda row: f"{row['tflops']:.3g}",
    "MFU (matmul)": lambda row: f"{row['mfu_matmul']:.1%} {row['precision']}",
    "MFU (data sheet)": lambda row: f"{row['mfu_data_sheet']:.1%}",
    "MiB per rank": lambda row: f"{row['peak_mib']:,.0f}",
    "first step s": lambda row: ", ".join(f"{seconds:.1f}" for seconds in row["first_step_seconds"]),
    "loader ms": lambda row: f"{1e3 * row['loader_seconds']:.3f}",
    "checkpoint ms": lambda row: f"{1e3 * row['checkpoint_seconds']:.1f}",
}
"""Formats each column's cell. The cell is empty where a contestant lacks the figure (None)."""


def format_table(rows: list[dict[str, Any]]) -> str:
    """The figures as text, followed by the contestants that failed and why."""
    lines = [["contestant", *COLUMNS]]
    for row in rows:
        if "rounds" in row:
            micro = f" ({row['micro_steps']} micro-steps)" if row["micro_steps"] > 1 else ""
            lines.append([row["contestant"] + micro, *(_cell(column, row) for column in COLUMNS.values())])
    failures = [
        f"{row['contestant']} failed: {reason}"
        for row in rows
        for reason in row.get("failures") or [row.get("failure")]
        if reason
    ]
    return "\n".join([align_columns(lines), *failures])


def _cell(column: Any, row: dict[str, Any]) -> str:
    """A row's text in a column; empty where the figure is None."""
    try:
        return str(column(row))
    except TypeError:  # None cannot be formatted
        return ""


def align_columns(lines: list[list[str]]) -> str:
    """The lines as columns, the first aligned left and the others right; columns without a figure are omitted."""
    columns = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in columns}
    return "\n".join(
        "  ".join(line[i].rjust(widths[i]) if i else line[i].ljust(widths[i]) for i in columns) for line in lines
    )
