"""Plot a run's losses as SVG: `python bench/plot_loss.py outputs/GPT-tiny/metrics.jsonl > bench/loss.svg`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 360, 60, 40


def main(path: str) -> None:
    """Print the SVG."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    train = [(row["step"], row["train-loss"]) for row in rows if "train-loss" in row]
    val = [(row["step"], row["val-loss"]) for row in rows if "val-loss" in row]
    last_step = train[-1][0]
    low, high = 2, 11

    def point(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 20) * step / last_step
        return x, 20 + (HEIGHT - BOTTOM - 20) * (high - loss) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in range(low, high + 1):
        x, y = point(0, loss)
        parts.append(f'<line x1="{x}" y1="{y:.1f}" x2="{WIDTH - 20}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{loss}</text>')
    for quarter in range(5):
        step = last_step * quarter / 4
        x, y = point(step, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{step:,.0f}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (point(*pair) for pair in train))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#4878d0" stroke-width="1.5"/>')
    for step, loss in val:
        x, y = point(step, loss)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#d65f5f"/>')
        parts.append(f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle" fill="#d65f5f">{loss:.2f}</text>')
    parts.append(
        f'<text x="{WIDTH - 24}" y="38" text-anchor="end" fill="#4878d0">training loss (nats per token)</text>'
    )
    parts.append(f'<text x="{WIDTH - 24}" y="58" text-anchor="end" fill="#d65f5f">validation loss</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text></svg>')
    print("\n".join(parts))


if __name__ == "__main__":
    main(sys.argv[1])
