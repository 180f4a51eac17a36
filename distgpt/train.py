"""The run, top to bottom: check, build, resume, loop, close.

`torchrun --nproc_per_node=4 -m distgpt.train configs/GPT-tiny.yaml [key=value ...] [--fresh]`, or without torchrun
`python -m distgpt.train ...` for one process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distgpt import supervise

if __name__ == "__main__":
    supervise.listen()  # before torch, which takes seconds to load

import numpy as np
import torch

from distgpt import check, checkpoint, durable, trained
from distgpt import config as configs
from distgpt import world as worlds
from distgpt.check import Start, changes
from distgpt.checkpoint import Checkpoint
from distgpt.config import Config
from distgpt.corpus import ORDER_VERSION, window_count
from distgpt.data import ShuffledReader
from distgpt.errors import NumericsError, file_name, leave, run_command
from distgpt.evaluate import evaluate
from distgpt.metrics import RECORD, Log, Score, device_name, open_log, peak_tflops
from distgpt.model import DecoderLM
from distgpt.optim import build_optimizer, learning_rate, set_learning_rate
from distgpt.parallel import Execution, Running, Weights, decide, parallelize
from distgpt.plan import BatchPlan, Layout, count
from distgpt.profile import profiled
from distgpt.saver import Saver, restore
from distgpt.step import seed_dropout, train_step, warm_up
from distgpt.supervise import Stopped, Supervisor
from distgpt.tokenizer import Tokenizer
from distgpt.world import World

MOST_SKIPPED = 10
"""Updates in a row, at a line of the log, that were skipped because their gradient was not finite: the run ends."""


@dataclass(frozen=True)
class Run:
    """Everything that a run consists of, made ready."""

    model: DecoderLM
    running: Running
    """The model as `parallelize` wrapped it: what the step calls."""
    optimizer: torch.optim.Optimizer
    reader: ShuffledReader
    log: Log
    state: dict[str, Any]
    """What checkpoints keep beside tensors."""
    first_step: int


def train(config: Config, fresh: bool, source: Path | None, world: World, supervisor: Supervisor) -> int:
    """Train until `num_training_steps`, from the newest checkpoint in `output_dir` if any. Every rank calls.

    A new run begins with the weights of the finished run or checkpoint `source`, if given, else with initial ones.
    Returns the exit code: 0, or that of a run that was told to stop.
    """
    output_dir = Path(config.output_dir)
    seen = world.by_first(lambda: names(output_dir))
    start = find_start(config, fresh, source, world)
    if start.results is None and world.by_first(lambda: supervisor.take_lock() or names(output_dir) != seen):
        start = find_start(config, fresh, source, world)  # another run had the folder until now, and has gone on
    world.check_same({"tokens": start.tokens.fingerprint})
    supervisor.step = start.resume.step if start.resume else 0
    if start.results is not None:
        show_results(config, start.results, world)
        supervisor.status("finished", code=0)
        return 0
    try:
        with Saver(output_dir, config.checkpoint.keep, supervisor.step, world) as saver:
            run = build(config, start, world, supervisor)
            score = partial(
                evaluate, run.model, start.tokens.val, start.tokenizer, config.seq_len, config.batch_size, world
            )
            try:
                loop(config, run, score, saver, world, supervisor)
                finish(config, start, run, score, saver, world, supervisor)
            except Stopped:
                run.log.close()
                raise
    except Stopped as reason:
        return supervisor.stopped(str(reason))
    supervisor.status("finished", code=0)
    return 0


def names(output_dir: Path) -> list[str]:
    """The checkpoints and results of a folder, by name."""
    return sorted(path.name for pattern in ("checkpoints/step-*", "eval.json") for path in output_dir.glob(pattern))


def find_start(config: Config, fresh: bool, source: Path | None, world: World) -> Start:
    """Check all that the run needs; rank 0 chooses the checkpoint, having hashed it, for all. Every rank calls."""

    def newest() -> Any:
        found, rejected = check.newest(config, fresh)
        return [found and [str(found.path), found.step, found.state], rejected]

    chosen, rejected = world.by_first(newest)
    found = Checkpoint(Path(chosen[0]), *chosen[1:]) if chosen else None
    return world.first_rank_first(lambda: check.check(config, fresh, source, (found, rejected)))


def loop(
    config: Config, run: Run, score: Callable[..., Score], saver: Saver, world: World, supervisor: Supervisor
) -> None:
    """Update, log, validate and save until the last step. Raises Stopped, after saving, if told to stop."""
    step, last_step, grad_clip = run.first_step, config.num_training_steps, config.optimizer.grad_clip
    schedule = (config.num_warmup_steps, last_step, config.min_lr, config.max_lr)
    skipped = torch.tensor(run.state["skipped"], device=world.device)
    val_loss, record = run.state["val_loss"], Path(config.output_dir) / RECORD

    def validate() -> float:
        found = score(partial(supervisor.obey, step), config.eval.max_tokens)
        run.log.evaluation(step, found)
        return found.loss

    def save() -> None:
        run.running.check_replicas(step, world)
        state = run.state | {"skipped": skipped.tolist(), "val_loss": val_loss}
        run.log.saving(step, saver.save(step, run.model, run.optimizer, state, record))

    try:
        supervisor.begin(step)
        if 0 < step < last_step and due(step, config.eval.every) and val_loss is None:  # it was interrupted
            val_loss = validate()
        stream = run.reader.steps(run.first_step, last_step, world.device)
        stream = profiled(stream, run.first_step + 1, config.profile.steps, record.parent, world, run.log.say)
        for step, batches in enumerate(stream, run.first_step + 1):
            rate, val_loss = learning_rate(step - 1, *schedule), None
            set_learning_rate(run.optimizer, rate)
            seed_dropout(config.seed, step, world.rank)
            result = train_step(run.running, run.optimizer, batches, config.tokens_per_step, grad_clip, world)
            skipped = (skipped + result.skipped) * torch.stack([torch.ones_like(result.skipped), result.skipped])
            run.log.step_done(step)
            if due(step, config.log_every, last_step):
                loss = float(world.sum(result.loss_sum)) / config.tokens_per_step
                in_all, in_a_row = map(int, skipped.tolist())
                check_numbers(run.reader, step, loss, in_a_row)
                run.log.step(step, loss, rate, float(result.grad_norm), in_all)
            for news in saver.report():
                run.log.say(news)
            if due(step, config.eval.every) and step < last_step:
                val_loss = validate()
            if due(step, config.checkpoint.every, last_step):
                save()
            elif due(step, config.parallel.compare_every):
                run.running.check_replicas(step, world)
            supervisor.obey(step)
    except Stopped:
        if saver.step < step:
            save()
        raise


def finish(
    config: Config,
    start: Start,
    run: Run,
    score: Callable[..., Score],
    saver: Saver,
    world: World,
    supervisor: Supervisor,
) -> None:
    """Score the model on all validation tokens and write what using it needs. Every rank calls."""
    last_step, output_dir = config.num_training_steps, Path(config.output_dir)
    run.log.memory(last_step, world.gather(world.peak_bytes))
    final = score(partial(supervisor.obey, last_step))
    run.log.evaluation(last_step, final)
    results = {"step": last_step} | final.results()
    saver.wait(last=True)
    trained.save(output_dir, run.model, world)
    whole = (json.dumps(results, indent=2) + "\n").encode()
    world.by_first(lambda: durable.replace(output_dir / "eval.json", whole))  # last: with it, the run is finished
    run.log.say(f"{json.dumps(results)}\nfinished: model.safetensors, eval.json and metrics.jsonl are in {output_dir}")
    run.log.close()


def build(config: Config, start: Start, world: World, supervisor: Supervisor) -> Run:
    """Build the run, restore its checkpoint if there is one, show what is about to happen, and compile."""
    n_vocab = start.tokenizer.n_vocab
    first_step = start.resume.step if start.resume else 0
    plan = config.batch_plan(world.size)
    execution = decide(config, n_vocab, world, earlier_execution(start.resume, config))
    state = run_state(config, start, execution, world)
    supervisor.status("running")
    model = trained.build_model(config, start.tokenizer)
    weights: Weights | None = None if start.source is None else trained.weights(start.source, model)
    running = parallelize(model, world, execution, () if start.resume else weights)
    optimizer = build_optimizer(model, config.optimizer)
    if world.is_first:
        prepare_output_dir(Path(config.output_dir), config, start.tokenizer, anew=start.resume is None)
    log = open_log(
        world,
        config=config,
        first_step=first_step,
        validated=state["val_loss"] is not None,
        flops_per_token=config.model_config.sizes(n_vocab).flops_per_token(config.seq_len),
        peak=peak_tflops(world.device, execution.precision),
        wandb_run_id=state["wandb_run_id"],
    )
    log.say(card(config, start, execution, plan, world))
    if start.resume:
        restore(start.resume, model, optimizer, world)
    stream = start.tokens.train, n_vocab, config.seq_len, config.seed
    reader = ShuffledReader(*stream, plan, world.rank, model.end_of_text)
    if execution.compile:
        log.say("compiling: up to half a minute the first time")
    warm_up(running, [batch.to(world.device) for batch in reader.at(first_step)], world)
    log.memory(first_step, world.gather(world.peak_bytes))
    if model.head.tiles is not None:  # whole logits would take up several times as much
        worlds.keep_freed_memory()
    return Run(model, running, optimizer, reader, log, state, first_step)


def due(step: int, every: int, last_step: int | None = None) -> bool:
    """Whether something that happens every so many steps (and after the last, if given) happens after this one."""
    return step % every == 0 or step == last_step


def earlier_execution(resume: Checkpoint | None, config: Config) -> Execution | None:
    """What the run being continued had decided, unless the config now asks for something else."""
    if resume is None:
        return None
    changed = {key.partition(".")[0] for key in changes(config, resume)}
    if changed & {"precision", "compile", "parallel", "activation_checkpointing"}:
        return None
    decided = resume.state["execution"]
    if "layout" not in decided:  # saved before there was a choice
        return None
    return Execution(**decided | {"layout": Layout(**decided["layout"])})


def run_state(config: Config, start: Start, execution: Execution, world: World) -> dict[str, Any]:
    """What a checkpoint keeps beside tensors: with it the same command continues the same run."""
    earlier = start.resume.state if start.resume else {}
    return {
        "config": dataclasses.asdict(config),
        "execution": dataclasses.asdict(execution),
        "order_version": ORDER_VERSION,
        "sequences_per_step": config.sequences_per_step,
        "platform": platform(world),
        "skipped": earlier.get("skipped", [0.0, 0.0]),
        "tokens": start.tokens.fingerprint,
        "tokenizer": start.tokenizer.fingerprint,
        "val_loss": earlier.get("val_loss"),
        "wandb_run_id": earlier.get("wandb_run_id") or secrets.token_hex(4),
    }


def platform(world: World) -> dict[str, Any]:
    """What the last bits of a result hang on, beside the run itself."""
    return {
        "torch": torch.__version__,
        "device": device_name(world.device),
        "ranks": world.size,
        "threads": world.threads,
    }


def installed() -> dict[str, str]:
    """What every rank must have alike for a run to be one: Python, libraries and this package's own source."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source.update(path.name.encode() + path.read_bytes())
    return {
        "Python version": sys.version.split()[0],
        "torch version": torch.__version__,
        "numpy version": np.__version__,
        "distgpt's source": source.hexdigest()[:12],
    }


def prepare_output_dir(output_dir: Path, config: Config, tokenizer: Tokenizer, anew: bool) -> None:
    """Write the resolved config and the tokenizer; `anew` first deletes what an earlier run left (and only that)."""
    if anew:
        checkpoint.remove_all(output_dir)
        for name in (RECORD, "eval.json", trained.WEIGHTS):
            (output_dir / name).unlink(missing_ok=True)
    durable.replace(output_dir / "config.yaml", configs.to_yaml(config).encode())
    tokenizer.save(output_dir / trained.TOKENIZER)


def card(config: Config, start: Start, execution: Execution, plan: BatchPlan, world: World) -> str:
    """What is about to happen, for people."""
    model, n_vocab, tokens = config.model_config, start.tokenizer.n_vocab, start.tokens
    sizes, steps, tokens_per_step = model.sizes(n_vocab), config.num_training_steps, config.tokens_per_step
    epochs = steps * plan.sequences / window_count(len(tokens.train), config.seq_len)
    flops = steps * tokens_per_step * sizes.flops_per_token(config.seq_len)
    compiled = "compiled" if execution.compile else "not compiled"
    lines = {
        "model": f"{count(model.n_layer, 'layer')}, {count(model.n_head, 'head')}, width {model.n_embd}, "
        f"{count(model.n_positions, 'position')}, {count(sizes.parameters, 'parameter')}",
        "tokens": f"{tokens.path}: {len(tokens.train):,} train, {len(tokens.val):,} val "
        f"({config.tokenizer_encoding}, vocabulary {n_vocab:,})",
        "batch": plan.equation(config.seq_len),
        "steps": f"{steps:,} ({steps * tokens_per_step:,} tokens, {epochs:.2f} epochs, {flops:.2g} FLOPs)",
        "device": f"{world.size} x {device_name(world.device)}"
        + (f", {count(world.threads, 'thread')}" if world.device.type == "cpu" else "")
        + "".join(f", {part}" for part in (execution.layout.describe(), execution.precision, compiled) if part)
        + f", torch {torch.__version__}",
        "output": f"{config.output_dir} (the same command continues a stopped run)",
    }
    if start.source:
        lines["from"] = f"{start.source}: beginning with its weights"
    if start.resume:
        lines["resume"] = f"{start.resume.path}: going on after step {start.resume.step:,}"
    notes = [f"note    {note}" for note in [*start.notes, *other_bits(start.resume, world)]]
    return "\n".join([*(f"{name:<8}{text}" for name, text in lines.items()), *notes])


def other_bits(resume: Checkpoint | None, world: World) -> Iterator[str]:
    """Why a run goes on with rounding other than it would have had, if it does."""
    now, then = platform(world), resume.state.get("platform", {}) if resume else {}
    changed = [f"{name} {now[name]} (was {then[name]})" for name in now if now[name] != then.get(name, now[name])]
    if changed:
        yield f"the same run but for rounding, not bit for bit: {', '.join(changed)}"


def check_numbers(reader: ShuffledReader, step: int, loss: float, skipped_in_a_row: int) -> None:
    """Raise NumericsError, on every rank, when gradients have stopped being numbers: no weight has moved since."""
    if skipped_in_a_row >= MOST_SKIPPED:
        first = step - skipped_in_a_row + 1
        windows = reader.windows_at(first - 1, all_ranks=True)
        listed = ", ".join(map(str, windows[:8])) + (", ..." if len(windows) > 8 else "")
        raise NumericsError(
            f"step {first}: its gradient was not finite, nor any to step {step} (the loss is {loss}), expected fewer "
            f"than {MOST_SKIPPED} in a row; it read sequences {listed} (of seq_len tokens each, from 0, of train); "
            "lower max_lr, raise num_warmup_steps or use precision=fp32, and start over; the last checkpoint is intact",
            everywhere=True,
        )


def show_results(config: Config, results: dict[str, Any], world: World) -> None:
    """Say that there is nothing left to do."""
    if world.is_first:
        print(f"{config.output_dir} is finished: {json.dumps(results)}")
        print("more num_training_steps go on from here; --fresh starts over")


def main(arguments: Sequence[str]) -> int:
    """Train the model that a config describes, or continue its run."""
    parser = configs.config_parser("python -m distgpt.train", str(main.__doc__))
    parser.add_argument("--fresh", action="store_true", help="delete the run in output_dir and start over")
    parser.add_argument("--from", dest="source", type=file_name, metavar="RUN", help="run or checkpoint to begin with")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    options = parser.parse_intermixed_args(arguments)
    config = configs.load(options.config, options.overrides)
    world = worlds.start(config.device, 60 * config.hang_minutes)
    settings = {"--fresh": options.fresh, "--from": options.source}
    world.check_same(dataclasses.asdict(config) | settings | installed())
    source = Path(options.source) if options.source else None
    fresh = options.fresh and world.restarts == 0  # torchrun's restarts go on
    with Supervisor(Path(config.output_dir), config.max_minutes, 60 * config.hang_minutes, world) as supervisor:
        code = train(config, fresh, source, world, supervisor)
    world.close()
    return code


if __name__ == "__main__":
    leave(worlds.record(run_command)(main))
