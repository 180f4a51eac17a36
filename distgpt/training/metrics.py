"""Metrics of a run: printed on the terminal, appended to `metrics.jsonl`, and passed on to the trackers."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from distgpt import atomic_io
from distgpt.config.schema import Config
from distgpt.distributed.context import DistributedContext
from distgpt.training.trackers import start_trackers

METRICS_FILE = "metrics.jsonl"

PEAK_TFLOPS = {
    "NVIDIA A100": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA A10G": 70,
    "NVIDIA L40S": 362,
}
"""Dense bf16 peak by prefix of the device's name, from NVIDIA's data sheets. Other devices have no MFU."""


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The device's bf16 peak in TFLOP/s, or None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for prefix, peak in PEAK_TFLOPS.items() if name.startswith(prefix)), None)


def device_name(device: torch.device) -> str:
    """The product name of a GPU or CPU where the system provides it, else the device's type."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return device.type


def is_interactive() -> bool:
    """Whether standard output is a terminal that can redraw a line."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


@dataclass(frozen=True)
class EvalResult:
    """How well a model predicts a stream of tokens."""

    loss: float
    """Mean loss over the targets in nats."""
    num_tokens: int
    """Targets scored."""
    num_bytes: int
    """Bytes of the text that the targets encode."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700))

    def numbers(self) -> dict[str, float]:
        """What is logged after an evaluation during training."""
        return {"val-loss": self.loss, "val-perplexity": self.perplexity}

    def results(self) -> dict[str, float | int]:
        """The content of eval.json. Bits per byte compares models with different tokenizers."""
        results: dict[str, float | int] = {**self.numbers()}
        if self.num_bytes:
            results["val-bits-per-byte"] = self.loss * self.num_tokens / self.num_bytes / math.log(2)
        return results | {"tokens": self.num_tokens}


class MetricLogger:
    """Prints and records a run's metrics. Only rank 0 has one; see `open_logger`."""

    def __init__(
        self,
        config: Config,
        *,
        first_step: int,
        validated: bool,
        flops_per_token: int,
        peak_tflops: float | None,
        world_size: int,
        run_id: str,
    ) -> None:
        """Continue the metrics file after `first_step`, the number of steps already done.

        `validated` says whether the validation after `first_step`, if one is due there, is complete. `peak_tflops` is
        that of one device. `run_id` identifies the run to trackers, also after a resume.
        """
        self._flops_per_token, self._tokens_per_step = flops_per_token, config.tokens_per_step
        self._peak_tflops, self._world_size = peak_tflops, world_size
        self._num_steps = config.num_training_steps
        self._last_step = first_step
        self._val_loss: float | None = None
        path = Path(config.output_dir) / METRICS_FILE
        _drop_rows_after(path, first_step, validated)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._warned = False
        self._bar = tqdm(
            total=self._num_steps,
            initial=first_step,
            disable=not is_interactive(),
            file=sys.stdout,
            dynamic_ncols=True,
            unit="step",
            bar_format="{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar:10}| eta {remaining}{postfix}",
        )
        self._trackers = start_trackers(config, run_id, first_step, self.print)
        self._restart_clock()

    def step_done(self, step: int) -> None:
        """Advance the progress bar. Call after every step: it does not wait for the device."""
        self._last_step = step
        self._bar.update(step - self._bar.n)

    def log_step(
        self,
        step: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        skipped: int = 0,
        extra: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        """Print and record a training step.

        The speed is the mean over the steps since the last call of any `log_` method. `skipped` counts the updates of
        the whole run that were skipped because their gradient was not finite. `extra` numbers are recorded by name.
        """
        seconds = (time.monotonic() - self._clock_start) / max(1, step - self._clock_step)
        tokens_per_second = self._tokens_per_step / seconds
        tflops = tokens_per_second * self._flops_per_token / 1e12
        mfu = None if self._peak_tflops is None else tflops / self._world_size / self._peak_tflops
        self._record(
            {
                "step": step,
                "train-loss": loss,
                "learning-rate": learning_rate,
                "grad-norm": grad_norm,
                "tokens-per-second": round(tokens_per_second, 1),
                "tflops": round(tflops, 6),
                "mfu": mfu if mfu is None else round(mfu, 4),
                "tokens": step * self._tokens_per_step,
                "skipped": skipped,
                **{name: float(value) for name, value in (extra or {}).items()},
            }
        )
        val_text = "" if self._val_loss is None else f"  val {self._val_loss:.4f}"
        mfu_text = "" if mfu is None else f" ({mfu:.1%} MFU)"
        skipped_text = f"  skipped {skipped}" if skipped else ""
        numbers = (
            f"loss {loss:.4f}{val_text}  lr {learning_rate:.2e}  norm {grad_norm:.2f}  "
            f"{tokens_per_second:,.0f} tok/s  {tflops:.3g} TFLOPS{mfu_text}{skipped_text}"
        )
        if self._bar.disable:
            eta = _format_duration((self._num_steps - step) * seconds)
            self.print(f"{self._step_label(step)}  {numbers}  eta {eta}")
        else:
            self._bar.set_postfix_str(numbers)
        self._restart_clock()

    def log_memory(self, step: int, peak_bytes: list[int | None]) -> None:
        """Print and record each rank's peak memory so far: tensors on a GPU, else the resident set. None: not known."""
        self._record({"step": step, "peak-bytes": peak_bytes})
        known = sorted(n_bytes for n_bytes in peak_bytes if n_bytes is not None)
        lowest_and_highest = dict.fromkeys(f"{n_bytes / 1e9:.2f} GB" for n_bytes in (known[:1] + known[-1:]))
        self.print(f"memory  {' to '.join(lowest_and_highest) or 'n/a'} peak per rank so far")
        self._restart_clock()

    def log_checkpoint_wait(self, step: int, waited_seconds: float) -> None:
        """Record how long training waited for a checkpoint."""
        self._record({"step": step, "checkpoint-wait-seconds": round(waited_seconds, 4)})
        self._restart_clock()

    def log_evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Print and record the named numbers of an evaluation, such as `val-loss`."""
        self._val_loss = numbers.get("val-loss", self._val_loss)
        self._record({"step": step, **numbers})
        digits = {name: 2 if name.endswith("perplexity") else 4 for name in numbers}
        texts = [f"{name} {value:.{digits[name]}f}" for name, value in numbers.items()]
        self.print("  ".join([self._step_label(step), *texts]))
        self._restart_clock()

    def save_file(self, path: Path) -> None:
        """Let the trackers keep a copy of a file."""
        for tracker in self._trackers:
            tracker.save_file(path)

    def print(self, text: str) -> None:
        """Print in one write; a closed pipe (`| head`) or a full disk does not stop the run."""
        try:
            with tqdm.external_write_mode(file=sys.stdout):
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
        except (OSError, ValueError):
            sys.stdout = open(os.devnull, "w")

    def close(self) -> None:
        """Finish the metrics file and the trackers, and print which of them failed."""
        self._bar.close()
        self._write()
        if self._unwritten:
            num_rows = self._unwritten.count(b"\n")
            self.print(f"warning: {METRICS_FILE}: its last {num_rows} lines could not be written")
        self._file.close()
        for tracker in self._trackers:
            if failure := tracker.finish():
                self.print(f"{tracker.name}: {failure}; {METRICS_FILE} has every number")

    def _restart_clock(self) -> None:
        """Exclude the time since the last step from the speed: it was not spent on steps."""
        self._clock_step, self._clock_start = self._last_step, time.monotonic()

    def _step_label(self, step: int) -> str:
        return f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}"

    def _record(self, row: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl and pass it on to the trackers."""
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[name] = None  # JSON has no NaN
        self._unwritten += json.dumps(row).encode() + b"\n"
        self._write()
        for tracker in self._trackers:
            tracker.log(row)

    def _write(self) -> None:
        """Write the rows that are not yet in metrics.jsonl. Where the disk is full, keep them for the next call."""
        try:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                self.print(
                    f"warning: {METRICS_FILE}: {error.strerror}; training continues, and the missing lines are written "
                    "as soon as that is fixed"
                )
            self._warned = True


class NullLogger:
    """The logger of every rank but 0: accepts any call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def open_logger(context: DistributedContext, config: Config, **settings: Any) -> MetricLogger:
    """A `MetricLogger` on rank 0 and a `NullLogger` on the others, so that callers need no `if`."""
    if context.is_rank0:
        return MetricLogger(config, world_size=context.world_size, **settings)
    return cast(MetricLogger, NullLogger())


def _drop_rows_after(path: Path, step: int, validated: bool) -> None:
    """Drop the rows that an earlier process recorded after `step`, the step that the run resumes from.

    Unless `step` is `validated`, its validation is dropped too: it was interrupted, and is repeated.
    """
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] < step or (row["step"] == step and (validated or "val-loss" not in row)):
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            pass  # a line that a crash cut short
    atomic_io.write_bytes(path, "".join(lines).encode())


def _format_duration(seconds: float) -> str:
    """`1:02:03` or `02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes:02}:{rest:02}"
