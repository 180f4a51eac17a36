"""The outcomes of `python -m bench.speed` as figures, and figures as a table."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from bench.contestants import Outcome, Race
from distgpt.metrics import peak_tflops


def speeds_of(outcomes: list[Outcome], race: Race, warm_up: int) -> list[float]:
    """Tokens per second of each line after the warm-up. A line is the mean of the steps since the last one."""
    tokens, speeds = race.prepared.shape.tokens, []
    for outcome in outcomes:
        before = [0.0, *(row["step"] for row in outcome.rows)]
        speeds += [tokens / row["seconds"] for row, last in zip(outcome.rows, before, strict=False) if last >= warm_up]
    return speeds


def figures(name: str, outcomes: list[Outcome], race: Race, warm_up: int, peak: dict[str, float]) -> dict[str, Any]:
    """A contestant's figures over all rounds."""
    good = [outcome for outcome in outcomes if outcome.failure is None]
    if not good:
        return {"contestant": name, "failure": outcomes[0].failure}
    speeds = speeds_of(good, race, warm_up)
    speed = statistics.median(speeds)
    low, _, high = statistics.quantiles(speeds, n=4, method="inclusive") if len(speeds) > 1 else speeds * 3
    on_gpu, precision = torch.cuda.is_available(), good[0].precision
    tflops = speed * race.prepared.flops_per_token / 1e12
    each = tflops / (race.ranks if on_gpu else 1)  # ranks on CPUs share one machine
    sheet = peak_tflops(torch.device("cuda"), precision) if on_gpu else None
    stalls = [outcome.checkpoint_seconds for outcome in good if outcome.checkpoint_seconds is not None]
    return {
        "contestant": name,
        "precision": precision,
        "tokens_per_second": speed,
        "quartiles": [low, high],
        "tflops": tflops,
        "matmul_tflops": peak[precision],
        "mfu_matmul": each / peak[precision],
        "mfu_data_sheet": each / sheet if sheet else None,
        "peak_mib": max(outcome.peak_mib for outcome in good),
        "first_step_seconds": [outcome.first_step_seconds for outcome in good],
        "loader_seconds": race.prepared.loader_seconds if stalls else None,
        "checkpoint_seconds": statistics.median(stalls) if stalls else None,
        "failures": [outcome.failure for outcome in outcomes if outcome.failure is not None],
        "rounds": [outcome.rows for outcome in good],
    }


def add_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say how many times as fast as each contestant distgpt was, on its defaults and in fp32."""
    speeds = {row["contestant"]: row.get("tokens_per_second") for row in rows}
    for row in rows:
        for key, name in (("distgpt_ratio", "distgpt"), ("distgpt_fp32_ratio", "distgpt fp32")):
            ours, theirs = speeds.get(name), speeds[row["contestant"]]
            row[key] = ours / theirs if ours and theirs else None
    return rows


COLUMNS = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "middle half": lambda row: "-".join(f"{speed:,.0f}" for speed in row["quartiles"]),
    "distgpt": lambda row: f"{row['distgpt_ratio']:.2f}x",
    "distgpt fp32": lambda row: f"{row['distgpt_fp32_ratio']:.2f}x",
    "TFLOPS": lambda row: f"{row['tflops']:.3g}",
    "MFU (matmul)": lambda row: f"{row['mfu_matmul']:.1%} {row['precision']}",
    "MFU (data sheet)": lambda row: f"{row['mfu_data_sheet']:.1%}",
    "MiB a rank": lambda row: f"{row['peak_mib']:,.0f}",
    "first step s": lambda row: ", ".join(f"{seconds:.1f}" for seconds in row["first_step_seconds"]),
    "loader ms": lambda row: f"{1e3 * row['loader_seconds']:.3f}",
    "checkpoint ms": lambda row: f"{1e3 * row['checkpoint_seconds']:.1f}",
}
"""Each column's cell; a figure that a contestant lacks (None) leaves its cell empty."""


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as text, then who failed and why."""
    lines = [["contestant", *COLUMNS]]
    for row in rows:
        if "rounds" in row:
            micro = f" ({row['micro_steps']} micro-steps)" if row["micro_steps"] > 1 else ""
            lines.append([row["contestant"] + micro, *(cell(column, row) for column in COLUMNS.values())])
    failures = [
        f"{row['contestant']} failed: {why}"
        for row in rows
        for why in row.get("failures") or [row.get("failure")]
        if why
    ]
    return "\n".join([aligned(lines), *failures])


def cell(column: Any, row: dict[str, Any]) -> str:
    """A column's text for a row; empty where the figure is None."""
    try:
        return str(column(row))
    except TypeError:  # None does not format
        return ""


def aligned(lines: list[list[str]]) -> str:
    """Columns side by side, the first to the left, the others to the right; those without a figure are left out."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in kept}
    return "\n".join(
        "  ".join(line[i].rjust(widths[i]) if i else line[i].ljust(widths[i]) for i in kept) for line in lines
    )
