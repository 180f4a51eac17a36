"""A training run, top to bottom: set up, resume, loop, finish.

`torchrun --nproc_per_node=4 -m distgpt.train configs/GPT-tiny.yaml [key=value ...] [--fresh]`, or without torchrun
`python -m distgpt.train ...` for a single process.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgpt.resilience.signals import install_signal_handlers

if __name__ == "__main__":
    install_signal_handlers()  # before torch, which takes seconds to load

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from distgpt import atomic_io
from distgpt.checkpoint import store
from distgpt.checkpoint.saver import Saver, restore
from distgpt.checkpoint.store import Checkpoint
from distgpt.checkpoint.weights import TOKENIZER_DIR, WEIGHTS_FILE, build_model, iter_weights, save_weights
from distgpt.config.help import config_parser
from distgpt.config.loader import config_to_yaml, load_config
from distgpt.config.schema import Config
from distgpt.data.dataloader import TrainLoader
from distgpt.data.sampler import ORDER_VERSION, BatchPlan, Sampler
from distgpt.data.tokenizer import Tokenizer
from distgpt.distributed.context import DistributedContext, init_distributed
from distgpt.distributed.layout import ParallelLayout
from distgpt.distributed.memory import tune_malloc
from distgpt.distributed.parallelize import NamedTensors, parallelize
from distgpt.distributed.replica_check import check_replicas
from distgpt.distributed.runtime import RuntimeConfig, resolve_runtime
from distgpt.errors import NumericsError, exit_process, path_argument, run_command
from distgpt.evaluate import EvalInputs, run_evaluations
from distgpt.optim.schedules import learning_rate
from distgpt.resilience.preflight import RunInputs, changed_keys, find_latest_checkpoint, run_preflight
from distgpt.resilience.watchdog import StopRequested, Watchdog
from distgpt.training.metrics import METRICS_FILE, MetricLogger, open_logger, peak_tflops
from distgpt.training.profiler import StepProfiler
from distgpt.training.run_header import format_run_header, platform_facts, software_versions
from distgpt.training.state import ModelState, OptimizerState, Progress, RunFacts, TrainState
from distgpt.training.step import StepSettings, seed_dropout, train_step, warm_up

MAX_CONSECUTIVE_SKIPS = 10
"""After so many consecutive updates skipped for non-finite gradients the run ends. Checked when a step is logged."""


@dataclass(frozen=True)
class TrainingRun:
    """A run that has been set up: what the loop works with."""

    config: Config
    context: DistributedContext
    runtime: RuntimeConfig
    model: nn.Module
    """The model as `parallelize` wrapped it, which the step calls."""
    optimizer: torch.optim.Optimizer
    loader: TrainLoader
    eval_inputs: EvalInputs
    state: TrainState
    """What checkpoints hold."""
    saver: Saver
    logger: MetricLogger
    watchdog: Watchdog
    first_step: int
    """Updates made before this process started."""

    def evaluate(self, step: int) -> None:
        """Run the evaluations on the first `eval.max_tokens` validation tokens. All ranks must call."""
        self.watchdog.step = step  # a stop between validation batches reports it
        inputs = dataclasses.replace(self.eval_inputs, max_tokens=self.config.eval.max_tokens)
        result, numbers = run_evaluations(inputs)
        self.logger.log_evaluation(step, result.numbers() | numbers)
        self.state.progress.val_loss = result.loss

    def save_checkpoint(self, step: int) -> None:
        """Compare the replicas, then save in the background. All ranks must call."""
        check_replicas(self.model, self.runtime.layout.shard_size, step, self.context)
        metrics_file = Path(self.config.output_dir) / METRICS_FILE
        self.logger.log_checkpoint_wait(step, self.saver.save(step, self.state, metrics_file))


def train(config: Config, fresh: bool, source: Path | None, context: DistributedContext, watchdog: Watchdog) -> int:
    """Train until `num_training_steps`, resuming from the latest checkpoint in `output_dir`. All ranks must call.

    A new run starts with the weights of the finished run or checkpoint `source`, if given, else with random ones.
    Returns the exit code: 0, or that of a run that was asked to stop.
    """
    output_dir = Path(config.output_dir)
    outputs = context.run_on_rank0(lambda: _list_outputs(output_dir))
    inputs = _resolve_inputs(config, fresh, source, context)
    if inputs.results is None and context.run_on_rank0(
        lambda: watchdog.acquire_lock() or _list_outputs(output_dir) != outputs
    ):
        inputs = _resolve_inputs(config, fresh, source, context)  # another run used the folder until now
    context.assert_same_on_ranks({"tokens": inputs.dataset.fingerprint})
    watchdog.step = inputs.resume.step if inputs.resume else 0
    if inputs.results is not None:
        _show_results(config, inputs.results, context)
        watchdog.write_status("finished", code=0)
        return 0
    try:
        with Saver(output_dir, config.checkpoint.keep, watchdog.step, context) as saver:
            run = set_up(config, inputs, context, saver, watchdog)
            try:
                run_loop(run)
                finish(run)
            except StopRequested:
                run.logger.close()
                raise
    except StopRequested as request:
        return watchdog.report_stopped(str(request))
    watchdog.write_status("finished", code=0)
    return 0


def set_up(
    config: Config, inputs: RunInputs, context: DistributedContext, saver: Saver, watchdog: Watchdog
) -> TrainingRun:
    """Build the run, restore its checkpoint if there is one, print the run header, and compile. All ranks must call."""
    resume, tokenizer, output_dir = inputs.resume, inputs.tokenizer, Path(config.output_dir)
    first_step = resume.step if resume else 0
    runtime = resolve_runtime(config, tokenizer.n_vocab, context, _previous_runtime(config, resume))
    context = context.with_mesh(runtime.layout.shard_size)
    plan = BatchPlan.from_config(config, context.dp_size)
    watchdog.write_status("running")

    base_model = build_model(config, tokenizer, runtime.kernels(config))
    weights: NamedTensors | None = None
    if resume:
        weights = ()  # the checkpoint's are restored below
    elif inputs.source:
        weights = iter_weights(inputs.source, base_model)
    model = parallelize(base_model, context, runtime, weights)
    optimizer = config.optimizer.build(base_model)
    facts = _run_facts(config, inputs, runtime, context)
    progress = Progress.start(context.device)
    state = TrainState(ModelState(model), OptimizerState(model, optimizer), facts, progress)
    context.run_on_rank0(lambda: _prepare_output_dir(output_dir, config, tokenizer, is_new=resume is None))
    if resume:
        restore(resume, state, context)

    logger = open_logger(
        context,
        config=config,
        first_step=first_step,
        validated=progress.val_loss is not None,
        flops_per_token=config.model_config.flops_per_token(tokenizer.n_vocab, config.seq_len),
        peak_tflops=peak_tflops(context.device, runtime.precision),
        run_id=facts.run_id,
    )
    logger.print(format_run_header(config, inputs, runtime, plan, context))
    windows = inputs.dataset.train_windows(config.seq_len, tokenizer.n_vocab)
    sampler = Sampler(len(windows), config.seed, plan, context.dp_rank)
    loader = TrainLoader(windows, sampler, end_of_text=base_model.end_of_text)
    eval_inputs = EvalInputs(
        base_model,
        inputs.dataset.val,
        tokenizer,
        config.seq_len,
        config.batch_size,
        runtime,
        context,
        after_batch=lambda: watchdog.raise_if_stop_requested(watchdog.step),
    )
    if runtime.compile:
        logger.print("compiling: up to half a minute the first time")
    warm_up(model, [batch.to(context.device) for batch in loader.micro_batches(first_step)], runtime)
    logger.log_memory(first_step, context.all_gather_object(context.peak_bytes))
    if runtime.kernels(config).cross_entropy != "full":  # its large buffers are worth keeping
        tune_malloc()
    return TrainingRun(
        config, context, runtime, model, optimizer, loader, eval_inputs, state, saver, logger, watchdog, first_step
    )


def run_loop(run: TrainingRun) -> None:
    """Update, log, evaluate and save until the last step. Raises StopRequested, after saving, if asked to stop."""
    config, context, logger, progress = run.config, run.context, run.logger, run.state.progress
    step, last_step, schedule = run.first_step, config.num_training_steps, config.schedule
    settings = StepSettings(config.tokens_per_step, config.optimizer.grad_clip, context.dp_size, run.runtime)
    batches = run.loader.iterate(step, last_step, context.device)
    output_dir = Path(config.output_dir)
    try:
        run.watchdog.start_training(step)
        if 0 < step < last_step and step % config.eval.every == 0 and progress.val_loss is None:
            run.evaluate(step)  # the evaluation of this step was interrupted
        with StepProfiler(config.profile.steps, step, output_dir, context, logger.print, last_step) as profiler:
            while step < last_step:
                lr = learning_rate(step, schedule)
                for group in run.optimizer.param_groups:
                    group["lr"] = lr
                step += 1
                seed_dropout(config.seed, step, context.rank)
                result = train_step(run.model, run.optimizer, next(batches), settings)
                progress.count_update(result.skipped)
                logger.step_done(step)

                if step % config.log_every == 0 or step == last_step:
                    loss = float(context.all_reduce_sum(result.loss_sum)) / config.tokens_per_step
                    skipped, consecutive_skips = map(int, progress.skipped.tolist())
                    _check_skips(run.loader.sampler, step, loss, consecutive_skips)
                    logger.log_step(step, loss, lr, float(result.grad_norm), skipped, result.extra)
                for warning in run.saver.drain_warnings():
                    logger.print(warning)

                if step % config.eval.every == 0 and step < last_step:
                    run.evaluate(step)
                if step % config.checkpoint.every == 0 or step == last_step:
                    run.save_checkpoint(step)
                elif step % config.parallel.replica_check_every == 0:
                    check_replicas(run.model, run.runtime.layout.shard_size, step, context)
                profiler.step_done()
                run.watchdog.raise_if_stop_requested(step)
    except StopRequested:
        if run.saver.step < step:
            run.save_checkpoint(step)
        raise


def finish(run: TrainingRun) -> None:
    """Evaluate on all validation tokens, and write the weights and `eval.json`. All ranks must call."""
    last_step, output_dir = run.config.num_training_steps, Path(run.config.output_dir)
    run.logger.log_memory(last_step, run.context.all_gather_object(run.context.peak_bytes))
    result, numbers = run_evaluations(run.eval_inputs)
    run.logger.log_evaluation(last_step, result.numbers() | numbers)
    results = {"step": last_step} | result.results() | numbers
    run.saver.wait(last=True)
    save_weights(output_dir, run.eval_inputs.model, run.context)
    content = (json.dumps(results, indent=2) + "\n").encode()
    # The last file: with it, the run is finished.
    run.context.run_on_rank0(lambda: atomic_io.write_bytes(output_dir / "eval.json", content))
    run.logger.save_file(output_dir / "eval.json")
    run.logger.print(json.dumps(results))
    run.logger.print(f"finished: {WEIGHTS_FILE}, eval.json and {METRICS_FILE} are in {output_dir}")
    run.logger.close()


def _list_outputs(output_dir: Path) -> list[str]:
    """The names of a folder's checkpoints and results."""
    return sorted(path.name for pattern in ("checkpoints/step-*", "eval.json") for path in output_dir.glob(pattern))


def _resolve_inputs(config: Config, fresh: bool, source: Path | None, context: DistributedContext) -> RunInputs:
    """Check everything that the run needs. Rank 0 chooses and hashes the checkpoint for all. All ranks must call."""

    def find() -> Any:
        checkpoint, rejected = find_latest_checkpoint(config, fresh)
        return [checkpoint and [str(checkpoint.path), checkpoint.step, checkpoint.state], rejected]

    fields, rejected = context.run_on_rank0(find)
    checkpoint = Checkpoint(Path(fields[0]), *fields[1:]) if fields else None
    return context.rank0_first(lambda: run_preflight(config, fresh, source, (checkpoint, rejected)))


def _previous_runtime(config: Config, resume: Checkpoint | None) -> RuntimeConfig | None:
    """What the run being resumed had resolved, unless the config now asks for something else."""
    if resume is None:
        return None
    changed = changed_keys(config, resume).keys() - {"parallel.replica_check_every"}
    if {key.partition(".")[0] for key in changed} & {"precision", "compile", "parallel", "activation_checkpointing"}:
        return None
    saved = resume.state["run"]["runtime"]
    if "layout" not in saved:  # saved before there was a choice of layouts
        return None
    return RuntimeConfig(**saved | {"layout": ParallelLayout(**saved["layout"])})


def _run_facts(config: Config, inputs: RunInputs, runtime: RuntimeConfig, context: DistributedContext) -> RunFacts:
    """What identifies the run in its checkpoints."""
    return RunFacts(
        config=dataclasses.asdict(config),
        runtime=dataclasses.asdict(runtime),
        order_version=ORDER_VERSION,
        sequences_per_step=config.sequences_per_step,
        platform=platform_facts(context),
        tokens=inputs.dataset.fingerprint,
        tokenizer=inputs.tokenizer.fingerprint,
        run_id=secrets.token_hex(4),
    )


def _prepare_output_dir(output_dir: Path, config: Config, tokenizer: Tokenizer, is_new: bool) -> None:
    """Write the resolved config and the tokenizer. A new run first deletes an earlier run's checkpoints and results."""
    if is_new:
        store.remove_all(output_dir)
        for name in (METRICS_FILE, "eval.json", WEIGHTS_FILE):
            (output_dir / name).unlink(missing_ok=True)
    atomic_io.write_bytes(output_dir / "config.yaml", config_to_yaml(config).encode())
    tokenizer.save(output_dir / TOKENIZER_DIR)


def _check_skips(sampler: Sampler, step: int, loss: float, consecutive_skips: int) -> None:
    """Raise NumericsError, on every rank, when gradients stay non-finite. Weights have not changed since."""
    if consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
        first = step - consecutive_skips + 1
        windows = sampler.windows_at_step(first - 1, all_ranks=True)
        listed = ", ".join(map(str, windows[:8])) + (", ..." if len(windows) > 8 else "")
        raise NumericsError(
            f"step {first}: the gradients of this step and all following to step {step} were not finite (the loss is "
            f"{loss}), expected fewer than {MAX_CONSECUTIVE_SKIPS} such steps in a row; step {first} read sequences "
            f"{listed} (0-based, of seq_len tokens each, of train); resume with precision=fp32, or start over with a "
            "lower max_lr or more num_warmup_steps; the last checkpoint is intact",
            on_all_ranks=True,
        )


def _show_results(config: Config, results: dict[str, Any], context: DistributedContext) -> None:
    """Tell the user that there is nothing left to do."""
    if context.is_rank0:
        print(f"{config.output_dir} is finished: {json.dumps(results)}")
        print("raise num_training_steps to continue this run; --fresh starts over")


def main(arguments: Sequence[str]) -> int:
    """Train the model that a config describes, or resume its run."""
    parser = config_parser("python -m distgpt.train", str(main.__doc__))
    parser.add_argument("--fresh", action="store_true", help="delete the run in output_dir and start over")
    parser.add_argument(
        "--from", dest="source", type=path_argument, metavar="RUN", help="run or checkpoint whose weights to start from"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    hang_seconds = 60 * config.hang_minutes
    context = init_distributed(config.device, hang_seconds)
    settings = {"--fresh": options.fresh, "--from": options.source}
    context.assert_same_on_ranks(dataclasses.asdict(config) | settings | software_versions())
    source = Path(options.source) if options.source else None
    fresh = options.fresh and context.restart_count == 0  # a restart by torchrun resumes
    with Watchdog(Path(config.output_dir), config.max_minutes, hang_seconds, context) as watchdog:
        code = train(config, fresh, source, context, watchdog)
    context.close()
    return code


if __name__ == "__main__":
    exit_process(record(run_command)(main))
