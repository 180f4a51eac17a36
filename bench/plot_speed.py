"""Plot measured speeds as SVG: `python bench/plot_speed.py RESULTS.json ... > bench/speed.svg`.

Each RESULTS.json was written by `python -m bench.speed --output RESULTS.json`. Shapes A and B on one rank get a panel
each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT, BAR, TOP = 720, 170, 70, 24, 40


def panel(result: dict[str, Any], top: int) -> tuple[list[str], int]:
    """A shape's bars, fastest first, below the y coordinate `top`; returns them and the y coordinate of their end."""
    rows = [row for row in result["contestants"] if "tokens_per_second" in row]
    rows.sort(key=lambda row: -row["tokens_per_second"])
    fastest = rows[0]["tokens_per_second"]
    title = f"shape {result['shape']}, tokens/s ({'{layers} layers, width {width}'.format(**result['sizes'])})"
    parts = [f'<text x="{LEFT}" y="{top + 24}" font-weight="bold">{title}</text>']
    for index, row in enumerate(rows):
        y, speed = top + TOP + index * BAR, row["tokens_per_second"]
        length = (WIDTH - LEFT - RIGHT) * speed / fastest
        colour = "#d65f5f" if row["contestant"].startswith("distgpt") else "#4878d0"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{row["contestant"]}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 6}" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + length + 6:.1f}" y="{y + 14}">{speed:,.0f}</text>')
    return parts, top + TOP + len(rows) * BAR


def main(paths: list[str]) -> None:
    """Print the SVG."""
    reports = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    report = reports[0]
    parts: list[str] = []
    bottom = 0
    for result in (result for report in reports for result in report["results"]):
        if result["shape"] in ("A", "B") and result["ranks"] == 1:
            bars, bottom = panel(result, bottom)
            parts += bars
    height = bottom + 36
    caption = f"{report['hardware']} x {report['devices']}, torch {report['torch']}, commit {report['commit']}"
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">')
    print(f'<style>text {{ font-size: 13px }}</style><rect width="{WIDTH}" height="{height}" fill="white"/>')
    print("\n".join(parts))
    print(f'<text x="{LEFT}" y="{height - 12}" fill="#777">{caption}</text></svg>')


if __name__ == "__main__":
    main(sys.argv[1:])
