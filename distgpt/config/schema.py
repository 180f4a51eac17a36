"""Every key of a run's configuration, and the checks between keys. Imports no torch.

The docstring below a field is its description in `--help`, in error messages and in the documentation. A field marked
MUTABLE may change when the run is resumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from distgpt.config.fields import MUTABLE, SECTION, Fraction, Rate, Size, Steps, Text, fields_of, section_members
from distgpt.models.architectures import ModelConfig
from distgpt.optim.optimizers import AdamWConfig, OptimizerConfig
from distgpt.optim.schedules import SCHEDULES, Schedule

if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = Literal[tuple(SCHEDULES)]

MAX_PROFILED_STEPS = 100
"""A trace holds every operation of its steps in memory, thousands per step of a large model."""

RENAMED_KEYS = {
    "parallel.shard_ranks": "parallel.shard_size",
    "parallel.compare_every": "parallel.replica_check_every",
    "parallel.reduce_gradients": "parallel.grad_sync",
}
"""Old key -> new key, in the same section. The old ones are still read from files, overrides and saved configs."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class EvalConfig:
    """Validation during training. The last step is always followed by one over all validation tokens."""

    every: Steps = 500
    """Steps between validations."""
    max_tokens: Annotated[int, Strict(), Field(ge=1, le=10**12)] = 2**16
    """Maximum number of validation tokens evaluated each time during training."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CheckpointConfig:
    """Checkpoints, from which the same command resumes."""

    every: Steps = 250
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, Strict(), Field(ge=2, le=10**6)] = 2
    """Newest valid checkpoints to keep, in addition to the one with the lowest validation loss."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ParallelConfig:
    """How the model is distributed over ranks. It affects speed and memory; results differ by rounding only."""

    strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    """none: one rank; ddp: a replica per rank; fsdp: sharded over all ranks; hsdp: sharded replicas; auto: none on one
    rank, else ddp if it fits in memory, else fsdp."""
    shard_size: Size | None = None
    """hsdp: ranks that share one replica of the model; null: the ranks of one machine."""
    reshard_after_forward: Annotated[bool, Strict()] = True
    """fsdp, hsdp: free a layer's gathered weights after each use (less memory), or keep them for the whole step (less
    communication)."""
    grad_sync: Literal["auto", "each", "last"] = "auto"
    """fsdp, hsdp: reduce gradients after each micro-step (less memory) or after the last (less communication); auto:
    last if it fits in memory."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are reduced over ranks; bf16 halves the communication and rounds each to 8 bits (fsdp,
    hsdp: after each micro-step)."""
    replica_check_every: Steps = 100
    """ddp, hsdp: steps between comparisons of the replicas' weights (checksums); one also precedes every checkpoint."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ProfileConfig:
    """A profile of some steps, written to `profile/` in output_dir."""

    steps: tuple[Steps, Steps] | None = None
    """First and last step of the Perfetto trace and the table of operations, such as [10, 12]; null: no profile."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class Config:
    """One run. Together with the tokens it determines what is computed; the number of ranks does not."""

    output_dir: Text = Field(json_schema_extra=MUTABLE)
    """Folder for everything the run writes."""
    tokenizer_encoding: Text = "gpt2"
    """Name of a tiktoken encoding, `bytes`, or the path of a .tiktoken file."""
    model_config: ModelConfig
    """The model: its architecture and sizes."""
    p_dropout: Fraction = 0.0
    """Dropout probability during training."""
    mask_documents: Annotated[bool, Strict()] = False
    """Restrict attention to one document and restart positions in each; documents begin with the end-of-text token."""
    data: Text | None = Field(default=None, json_schema_extra=MUTABLE)
    """File or folder with the token arrays `train` and `val`; null: data/tokens.npz if it exists, else the sample
    corpus."""
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the data order and dropout."""
    device: Annotated[str, Strict(), Field(pattern=r"^(auto|cpu|cuda(:\d{1,4})?|mps)$")] = Field(
        default="auto", json_schema_extra=MUTABLE | {"allowed": "auto, cpu, cuda, cuda:N or mps"}
    )
    """auto (a GPU if there is one), cpu, cuda, cuda:N or mps."""
    batch_size: Size = Field(json_schema_extra=MUTABLE)
    """Most sequences in one forward pass of one rank; without global_batch_size, also sets the sequences per update."""
    seq_len: Size
    """Tokens in a training sequence; at most n_positions."""
    grad_accumulation_steps: Size = Field(default=1, json_schema_extra=MUTABLE)
    """Micro-steps per update on one device; sets global_batch_size to batch_size x grad_accumulation_steps."""
    global_batch_size: Annotated[int, Strict(), Field(ge=1, le=2**30)] | None = Field(
        default=None, json_schema_extra=MUTABLE
    )
    """Sequences per update over all ranks; null: batch_size x grad_accumulation_steps."""
    num_warmup_steps: Annotated[int, Strict(), Field(ge=0, le=10**9)]
    """Steps in which the learning rate rises linearly from 0 to max_lr."""
    num_training_steps: Steps = Field(json_schema_extra=MUTABLE)
    """Optimizer updates in the whole run."""
    min_lr: Rate
    """Learning rate at the end of the schedule."""
    max_lr: Rate
    """Learning rate after the warm-up."""
    lr_schedule: ScheduleName = "cosine"
    """Shape of the learning rate after the warm-up; wsd: max_lr, then a linear decay; constant: always max_lr."""
    lr_decay_steps: Steps | None = Field(default=None, json_schema_extra=MUTABLE)
    """Step at which the learning rate reaches min_lr and stays there; null: num_training_steps."""
    lr_decay_fraction: Annotated[float, Strict(), Field(gt=0, le=1)] = Field(default=0.2, json_schema_extra=MUTABLE)
    """wsd: share of lr_decay_steps, at their end, in which the learning rate decays."""
    optimizer: OptimizerConfig = Field(default_factory=AdamWConfig)
    """The optimizer and its settings."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = Field(default="auto", json_schema_extra=MUTABLE)
    """Precision of matrix multiplication; auto: bf16 if the hardware supports it natively, else fp32."""
    compile: Literal["auto", "on", "off"] = Field(default="auto", json_schema_extra=MUTABLE)
    """torch.compile; auto: if a compiler is installed and the run is long enough to gain from it."""
    activation_checkpointing: Literal["none", "full", "selective"] = Field(default="none", json_schema_extra=MUTABLE)
    """Recompute layers in backward, in full or (selective) except for matmuls and attention: less memory, more time."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, json_schema_extra=MUTABLE)
    """How the model is distributed over ranks."""
    log_every: Steps = Field(default=10, json_schema_extra=MUTABLE)
    """Steps between lines of the log and of metrics.jsonl."""
    eval: EvalConfig = Field(default_factory=EvalConfig, json_schema_extra=MUTABLE)
    """Validation during training."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, json_schema_extra=MUTABLE)
    """Checkpoints."""
    profile: ProfileConfig = Field(default_factory=ProfileConfig, json_schema_extra=MUTABLE)
    """Profile of some steps."""
    max_minutes: Annotated[float, Strict(), Field(gt=0, le=10**6)] | None = Field(
        default=None, json_schema_extra=MUTABLE
    )
    """Time limit, after which the run saves a checkpoint and stops, as after a signal; the same command resumes it."""
    hang_minutes: Annotated[float, Strict(), Field(gt=0, le=10**6)] = Field(default=15.0, json_schema_extra=MUTABLE)
    """A run without a finished step or validation batch for this long counts as hung and ends, also while compiling."""
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(default="auto", json_schema_extra=MUTABLE)
    """Weights & Biases; auto: online if you are logged in, else disabled."""
    tensorboard: Annotated[bool, Strict()] = Field(default=False, json_schema_extra=MUTABLE)
    """Write TensorBoard event files to `tensorboard/` in output_dir."""

    @property
    def sequences_per_step(self) -> int:
        """Sequences per update over all ranks; it does not depend on their number."""
        return self.global_batch_size or self.batch_size * self.grad_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Target tokens per update over all ranks."""
        return self.sequences_per_step * self.seq_len

    @property
    def schedule(self) -> Schedule:
        """The learning-rate schedule of the run."""
        return Schedule(
            self.lr_schedule,
            self.max_lr,
            self.min_lr,
            self.num_warmup_steps,
            self.lr_decay_steps or self.num_training_steps,
            self.lr_decay_fraction,
        )


def flatten(config: Config) -> dict[str, Any]:
    """Every value by its dotted key."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(dataclasses.asdict(config), ""))


def mutable_keys(section: type = Config) -> set[str]:
    """The dotted keys of all values that may change when a run is resumed."""
    return set(_mutable_keys(section, "", False))


def _mutable_keys(section: type, prefix: str, inherited: bool) -> Iterator[str]:
    """`inherited`: whether the section itself is marked."""
    for name, field in fields_of(section).items():
        extra = field.json_schema_extra
        mutable = inherited or (isinstance(extra, dict) and MUTABLE.items() <= extra.items())
        for member in section_members(field):
            yield from _mutable_keys(member, f"{prefix}{name}.", mutable)
        if mutable and not section_members(field):
            yield prefix + name


def cross_field_errors(config: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) for values that are legal alone and wrong together."""
    for key, text in config.model_config.cross_field_errors():
        yield f"model_config.{key}", text
    if config.seq_len > config.model_config.n_positions:
        yield (
            "seq_len",
            f"got {config.seq_len}, but the model reads at most model_config.n_positions = "
            f"{config.model_config.n_positions} tokens; lower seq_len or raise n_positions",
        )
    yield from _learning_rate_errors(config)
    implied = config.batch_size * config.grad_accumulation_steps
    if config.grad_accumulation_steps > 1 and config.global_batch_size not in (None, implied):
        yield (
            "global_batch_size",
            f"got {config.global_batch_size}, but batch_size x grad_accumulation_steps = {implied}; "
            "leave out grad_accumulation_steps: the micro-steps follow from global_batch_size",
        )
    parallel = config.parallel
    if parallel.shard_size is not None and parallel.strategy != "hsdp":
        yield (
            "parallel.shard_size",
            f"got {parallel.shard_size} with parallel.strategy = {parallel.strategy}, expected strategy hsdp; "
            "leave it out or set the strategy",
        )
    first, last = config.profile.steps or (1, 1)
    if not first <= last < first + MAX_PROFILED_STEPS:
        yield (
            "profile.steps",
            f"got [{first}, {last}], expected the first and the last of at most {MAX_PROFILED_STEPS} steps, such as "
            f"[{first}, {first + 2}]",
        )
    for name in ("output_dir", "data", "tokenizer_encoding"):
        control = [c for c in getattr(config, name) or "" if c < " " or c == "\x7f"]
        if control:
            yield name, f"got the control character {control[0]!r}, expected a name or path without it; remove it"


def _learning_rate_errors(config: Config) -> Iterator[tuple[str, str]]:
    """What `cross_field_errors` yields for the keys of the schedule."""
    horizon = "num_training_steps" if config.lr_decay_steps is None else "lr_decay_steps"
    num_decay_steps = config.schedule.num_decay_steps
    remedy = "lower one or raise the other"
    if config.num_warmup_steps > num_decay_steps:
        expected = f"expected at most {horizon} = {num_decay_steps}"
        yield "num_warmup_steps", f"got {config.num_warmup_steps}, {expected}; {remedy}"
    if config.min_lr > config.max_lr:
        yield "min_lr", f"got {config.min_lr:g}, expected at most max_lr = {config.max_lr:g}; {remedy}"
