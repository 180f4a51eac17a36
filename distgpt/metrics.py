"""Numbers measured and written: the terminal, `metrics.jsonl`, Weights & Biases. Only the `Log` of rank 0 speaks."""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from distgpt import durable
from distgpt.config import Config
from distgpt.world import World, is_interactive, wandb_logged_in

RECORD = "metrics.jsonl"

PEAK_TFLOPS = {
    "NVIDIA A100": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA A10G": 70,
    "NVIDIA L40S": 362,
}
"""Dense bf16 peak by the start of the device's name, from NVIDIA's data sheets; a device not listed has no MFU."""


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The device's bf16 peak in TFLOP/s, or None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for start, peak in PEAK_TFLOPS.items() if name.startswith(start)), None)


def device_name(device: torch.device) -> str:
    """What people call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return device.type


@dataclass(frozen=True)
class Score:
    """How well a model predicts a stream of tokens."""

    loss: float
    """Mean loss over the targets in nats."""
    tokens: int
    """Targets scored."""
    text_bytes: int
    """Bytes of text that they stand for."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700))

    def results(self) -> dict[str, float | int]:
        """What eval.json holds. Bits per byte compares models whatever their tokenizers."""
        results: dict[str, float | int] = {"val-loss": self.loss, "val-perplexity": self.perplexity}
        if self.text_bytes:
            results["val-bits-per-byte"] = self.loss * self.tokens / self.text_bytes / math.log(2)
        return results | {"tokens": self.tokens}


class Log:
    """What a run shows and records, step by step."""

    def __init__(
        self,
        config: Config,
        first_step: int,
        validated: bool,
        flops_per_token: int,
        peak: float | None,
        ranks: int,
        wandb_run_id: str,
    ) -> None:
        self.config, self.flops_per_token = config, flops_per_token
        self.tokens_per_step = config.tokens_per_step
        self.peak, self.ranks = peak, ranks
        self.last_step = first_step
        self.warned = False
        self.val_loss: float | None = None
        path = Path(config.output_dir) / RECORD
        truncate(path, first_step, validated)
        self.file = path.open("ab", buffering=0)
        self.unwritten = b""
        self.wandb = start_wandb(config, wandb_run_id)
        total = config.num_training_steps
        self.bar = tqdm(
            total=total,
            initial=first_step,
            disable=not is_interactive(),
            file=sys.stdout,
            dynamic_ncols=True,
            unit="step",
            bar_format="{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar:10}| eta {remaining}{postfix}",
        )
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave the time since the last step out of the speed: it went into something else."""
        self.clock_step, self.clock_at = self.last_step, time.monotonic()

    def step_done(self, step: int) -> None:
        """Move the progress bar; costs nothing and waits for nothing."""
        self.last_step = step
        self.bar.update(step - self.bar.n)

    def step(self, step: int, loss: float, learning_rate: float, grad_norm: float, skipped: int = 0) -> None:
        """Show and record a training step's numbers; speed is over the steps since the clock was last restarted.

        `skipped` counts the updates left out in the run so far because their gradient was not finite.
        """
        seconds = (time.monotonic() - self.clock_at) / max(1, step - self.clock_step)
        tokens_per_second = self.tokens_per_step / seconds
        tflops = tokens_per_second * self.flops_per_token / 1e12
        mfu = None if self.peak is None else tflops / self.ranks / self.peak
        self.record(
            {
                "step": step,
                "train-loss": loss,
                "learning-rate": learning_rate,
                "grad-norm": grad_norm,
                "tokens-per-second": round(tokens_per_second, 1),
                "tflops": round(tflops, 6),
                "mfu": mfu if mfu is None else round(mfu, 4),
                "tokens": step * self.tokens_per_step,
                "skipped": skipped,
            }
        )
        val = "" if self.val_loss is None else f"  val {self.val_loss:.4f}"
        warning = f"  skipped {skipped}" if skipped else ""
        share = "" if mfu is None else f" ({mfu:.1%} MFU)"
        numbers = (
            f"loss {loss:.4f}{val}  lr {learning_rate:.2e}  norm {grad_norm:.2f}  "
            f"{tokens_per_second:,.0f} tok/s  {tflops:.3g} TFLOPS{share}{warning}"
        )
        if self.bar.disable:
            total = self.config.num_training_steps
            eta = duration((total - step) * seconds)
            self.say(f"step {step:>{len(str(total))}}/{total}  {numbers}  eta {eta}")
        else:
            self.bar.set_postfix_str(numbers)
        self.restart_clock()

    def memory(self, step: int, peak_bytes: list[int | None]) -> None:
        """Show and record the most memory that each rank has used so far (tensors on a GPU, else what is resident)."""
        self.record({"step": step, "peak-bytes": peak_bytes})
        known = sorted(n_bytes for n_bytes in peak_bytes if n_bytes is not None)
        ends = dict.fromkeys(f"{n_bytes / 1e9:.2f} GB" for n_bytes in (known[:1] + known[-1:]))
        self.say(f"memory  {' to '.join(ends) or 'n/a'} at most on each rank so far")
        self.restart_clock()

    def saving(self, step: int, waited_seconds: float) -> None:
        """Record for how long training waited for a checkpoint."""
        self.record({"step": step, "checkpoint-wait-seconds": round(waited_seconds, 4)})
        self.restart_clock()

    def evaluation(self, step: int, score: Score) -> None:
        """Show and record a validation."""
        self.val_loss = score.loss
        self.record({"step": step, "val-loss": score.loss, "val-perplexity": score.perplexity})
        total = self.config.num_training_steps
        self.say(
            f"step {step:>{len(str(total))}}/{total}  val-loss {score.loss:.4f}  val-perplexity {score.perplexity:.2f}"
        )
        self.restart_clock()

    def record(self, values: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl and send it to Weights & Biases."""
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None  # JSON has no NaN
        self.unwritten += json.dumps(values).encode() + b"\n"
        self.write()
        if self.wandb is not None:
            self.wandb.send(values)

    def write(self) -> None:
        """Write what is not yet in metrics.jsonl; a full disk is told once, and what did not fit is kept for later."""
        try:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:  # training goes on, and the record with it once there is room
            if not self.warned:
                self.say(f"warning: {RECORD}: {error.strerror}; it goes on once that is mended")
            self.warned = True

    def say(self, text: str) -> None:
        """Print for people; a reader that has gone (`| head`) or a full disk does not stop the run."""
        try:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError):
            sys.stdout = open(os.devnull, "w")

    def close(self) -> None:
        """Finish all outputs."""
        self.bar.close()
        self.write()
        if self.unwritten:
            self.say(f"warning: {RECORD}: its last {self.unwritten.count(10)} lines could not be written")
        self.file.close()
        if self.wandb is not None and (failure := self.wandb.close()):
            self.say(f"wandb: {failure}; metrics.jsonl has every number")


class Silence:
    """The log of every rank but the first: takes any call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def open_log(world: World, **settings: Any) -> Log:
    """A `Log` on rank 0, silence elsewhere: callers need no `if`."""
    return Log(ranks=world.size, **settings) if world.is_first else cast(Log, Silence())


def truncate(path: Path, step: int, validated: bool) -> None:
    """Drop what an earlier run recorded after `step`, the step that it is continued from.

    Unless `step` has been `validated`, its validation is dropped too: it was interrupted, and is made again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] < step or (row["step"] == step and (validated or "val-loss" not in row)):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            pass  # a line that a crash cut short
    durable.replace(path, "".join(kept).encode())


def duration(seconds: float) -> str:
    """`1:02:03` or `02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes:02}:{rest:02}"


class WandbThread:
    """Weights & Biases on a thread of its own: it may be slow, hang or fail, and training does not notice."""

    CLOSE_SECONDS = 15

    def __init__(self, config: Config, run_id: str, mode: str) -> None:
        self.config, self.run_id, self.mode = config, run_id, mode
        self.failure: str | None = None
        self.records: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=10_000)
        self.thread = threading.Thread(target=self.work, name="wandb", daemon=True)
        self.thread.start()

    def work(self) -> None:
        """Send records until None comes."""
        import dataclasses

        try:
            import wandb

            run = wandb.init(
                project="distgpt",
                name=Path(self.config.output_dir).name,
                id=self.run_id,
                resume="allow",
                mode=cast(Any, self.mode),
                dir=self.config.output_dir,
                config=dataclasses.asdict(self.config),
                settings=wandb.Settings(silent=True),
            )
            while (record := self.records.get()) is not None:
                run.log(record, step=record["step"])
            run.finish()
        except Exception as error:  # whatever a missing package or network raises
            self.failure = (
                f"stopped ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''})"
            )

    def send(self, record: dict[str, Any]) -> None:
        """Queue a record; dropped where the queue is full or the thread has failed."""
        if self.failure is None:
            try:
                self.records.put_nowait(record)
            except queue.Full:
                pass

    def close(self) -> str | None:
        """Wait a moment for what is queued; returns what went wrong, if anything did."""
        try:
            self.records.put_nowait(None)
        except queue.Full:
            pass
        self.thread.join(self.CLOSE_SECONDS)
        return self.failure or (f"still busy after {self.CLOSE_SECONDS} s" if self.thread.is_alive() else None)


def start_wandb(config: Config, run_id: str) -> WandbThread | None:
    """Weights & Biases as the config asks, or None."""
    mode = config.wandb
    if mode == "auto":
        mode = "online" if wandb_logged_in() else "disabled"
    return None if mode == "disabled" else WandbThread(config, run_id, mode)
