"""What a run is: its keys and their checks. Imports no torch.

`python -m distgpt.config CONFIG [key=value ...]` prints the resolved config and the batch equation; with `--plan`, also
what it needs on paper under each strategy.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from distgpt.errors import ConfigError, Parser, file_name, leave, run_command
from distgpt.plan import BatchPlan, Layout, Sizes, Work, count, layouts, table
from distgpt.source import CONSTANTS, MOST_PROBLEMS, NUMBER, YAML_1_1_BOOLEANS, Key, Source, dotted, read_source

Text = Annotated[str, Strict(), Field(min_length=1, max_length=4096)]
Size = Annotated[int, Strict(), Field(ge=1, le=2**20)]
Steps = Annotated[int, Strict(), Field(ge=1, le=10**9)]
Rate = Annotated[float, Strict(), Field(ge=0, le=10)]
Fraction = Annotated[float, Strict(), Field(ge=0, lt=1)]

MOST_PROFILED = 100
"""Steps in a trace: a step of a large model is thousands of operations, all held in memory."""

SETTINGS = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class ModelConfig:
    """The decoder's sizes."""

    n_embd: Annotated[int, Strict(), Field(ge=1, le=2**16)]
    """Width: numbers a token is represented by."""
    n_head: Annotated[int, Strict(), Field(ge=1, le=2**12)]
    """Attention heads in a layer; divides n_embd."""
    n_positions: Size
    """Longest sequence the model can read, in tokens."""
    n_layer: Annotated[int, Strict(), Field(ge=1, le=2**12)]
    """Decoder layers."""

    def sizes(self, n_vocab: int) -> Sizes:
        """With a vocabulary: what the plan on paper needs."""
        return Sizes(n_vocab, self.n_embd, self.n_head, self.n_positions, self.n_layer)


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019)."""

    beta1: Fraction = 0.9
    """Decay of the gradient's running mean."""
    beta2: Fraction = 0.95
    """Decay of the squared gradient's running mean."""
    eps: Annotated[float, Strict(), Field(gt=0, le=1)] = 1e-8
    """Added to the root of the squared mean before dividing by it."""
    weight_decay: Rate = 0.1
    """Decoupled weight decay, on matrices and embeddings only."""
    grad_clip: Annotated[float, Strict(), Field(gt=0, le=10**9)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class EvalConfig:
    """Validation during training; the run's last step is always followed by one over all validation tokens."""

    every: Steps = 500
    """Steps between validations."""
    max_tokens: Annotated[int, Strict(), Field(ge=1, le=10**12)] = 2**16
    """Most validation tokens scored each time during training."""


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class CheckpointConfig:
    """Checkpoints, from which the same command goes on."""

    every: Steps = 250
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, Strict(), Field(ge=2, le=10**6)] = 2
    """Newest valid checkpoints kept, besides the one of lowest validation loss; older ones are deleted."""


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class ParallelConfig:
    """How the model is spread over ranks: speed and memory, never (but for rounding) the result."""

    strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    """none: one rank; ddp: a whole model on each; fsdp: a part of it; auto: none, else ddp while it fits, else fsdp."""
    shard_ranks: Size | None = None
    """hsdp: ranks that hold one copy of the model together; null: the ranks of one machine."""
    reshard_after_forward: Annotated[bool, Strict()] = True
    """fsdp, hsdp: free a layer's gathered weights after each use (less memory), or keep them a step (less traffic)."""
    reduce_gradients: Literal["auto", "each", "last"] = "auto"
    """fsdp, hsdp: exchange after each micro-step (less memory) or the last (less traffic); auto: last if it fits."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which ranks exchange gradients; bf16 halves the traffic and rounds each to 8 bits."""
    compare_every: Steps = 100
    """ddp, hsdp: steps between comparisons of the ranks' weights, bit by bit; each checkpoint is preceded by one."""


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class ProfileConfig:
    """Where the time of some steps goes, in `profile/` of output_dir."""

    steps: tuple[Steps, Steps] | None = None
    """First and last step to trace for Perfetto and to count by operation, such as [10, 12]; null: none."""


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class Config:
    """One run. With the tokens and the seed it determines what is computed; the number of ranks does not."""

    output_dir: Text
    """Folder for everything the run writes."""
    tokenizer_encoding: Text = "gpt2"
    """A tiktoken encoding's name, `bytes`, or the path of a .tiktoken rank file."""
    model_config: ModelConfig
    """The decoder's sizes."""
    p_dropout: Fraction = 0.0
    """Probability of dropping an activation in training."""
    mask_documents: Annotated[bool, Strict()] = False
    """Attention stays within a document and positions restart; each begins with its end-of-text token."""
    data: Text | None = None
    """.npz file of integer arrays `train` and `val`; null: data/tokens.npz or, without it, the sample corpus."""
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**63)] = 0
    """Fixes the initial weights, the order of the data, and dropout."""
    device: Annotated[str, Strict(), Field(pattern=r"^(auto|cpu|cuda(:\d{1,4})?|mps)$")] = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:N or mps."""
    batch_size: Size
    """Most sequences one rank feeds through the model at a time: memory, never the result."""
    seq_len: Size
    """Tokens in a training sequence; at most n_positions."""
    grad_accumulation_steps: Size = 1
    """Batches added up for one update on one device; with batch_size it gives global_batch_size."""
    global_batch_size: Annotated[int, Strict(), Field(ge=1, le=2**30)] | None = None
    """Sequences per update over all ranks; null: batch_size x grad_accumulation_steps."""
    num_warmup_steps: Annotated[int, Strict(), Field(ge=0, le=10**9)]
    """Steps in which the learning rate rises linearly from 0 to max_lr."""
    num_training_steps: Steps
    """Updates in the whole run; the learning rate falls towards min_lr until the last."""
    min_lr: Rate
    """Learning rate at the end."""
    max_lr: Rate
    """Learning rate after the warm-up."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW's settings."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """Matmul precision; auto: bf16 where the hardware multiplies it natively, else fp32 (strict)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: for runs long enough to win back the compilation, where a compiler is found."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Layers computed again in backward, whole or (selective) without matmuls and attention: less memory, more time."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the model is spread over ranks."""
    log_every: Steps = 10
    """Steps between lines of the log and of metrics.jsonl."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Validation."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    """Where the time of some steps goes."""
    max_minutes: Annotated[float, Strict(), Field(gt=0, le=10**6)] | None = None
    """Stop by itself after so long, everything saved, as a signal would; the same command goes on."""
    hang_minutes: Annotated[float, Strict(), Field(gt=0, le=10**6)] = 15.0
    """Without a step or a validation batch for so long, the run counts as hung and ends (compilation included)."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto: online if you are logged in, else disabled."""

    @property
    def sequences_per_step(self) -> int:
        """G of the design: sequences per update, whatever the number of ranks."""
        return self.global_batch_size or self.batch_size * self.grad_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Targets of one update, whatever the number of ranks."""
        return self.sequences_per_step * self.seq_len

    def batch_plan(self, ranks: int) -> BatchPlan:
        """How `ranks` share an update."""
        return BatchPlan(self.sequences_per_step, self.batch_size, ranks)

    def work(self, n_vocab: int, ranks: int, precision: str) -> Work:
        """What a step computes, for the plan on paper."""
        return Work(self.model_config.sizes(n_vocab), self.batch_plan(ranks), self.seq_len, precision == "bf16")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config, apply `key=value` overrides and check everything that needs no data and no device.

    Raises ConfigError with one line a problem, all of them at once.
    """
    source = read_source(path, overrides)
    config = validate(source, str(path))
    if source.problems:
        lines = [line for _, line in source.problems]
        if source.left_out:
            lines.append(f"{path}: and {source.left_out:,} more problems, left out here; mend these first")
        raise ConfigError("\n".join(lines), everywhere=True)
    assert config is not None
    return config


def from_dict(values: dict[str, Any]) -> Config:
    """A config that was saved as a dict; keys that are newer than it get their defaults."""
    return TypeAdapter(Config).validate_python(values)


def flat(config: Config) -> dict[str, Any]:
    """Every value by its dotted key."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(dataclasses.asdict(config), ""))


def validate(source: Source, path: str) -> Config | None:
    """Check types, ranges and how keys fit together; problems are reported to `source`."""
    described = dict(walk_keys())
    for key in sorted(source.ambiguous):
        if key in described and described[key].kind == "text":
            text = "got an unquoted yes, no, on or off, which YAML versions read differently; quote it"
            source.report(key, source.places[key], text)
    try:
        config = TypeAdapter(Config).validate_python(source.values)
    except ValidationError as error:
        details = error.errors()
        source.left_out += len(details[MOST_PROBLEMS:])
        for detail in details[:MOST_PROBLEMS]:
            key = tuple(map(str, detail["loc"]))
            known = key in described or detail["type"] == "unexpected_keyword_argument"
            key = key if known else key[:-1]  # pydantic names the arm of a union last
            source.report(key, source.places.get(key, path), explain(key, dict(detail), described))
        return None
    for name, text in conflicts(config):
        key = tuple(name.split("."))
        source.report(key, source.places.get(key, path), text)
    return config


def explain(key: Key, detail: dict[str, Any], described: Mapping[Key, KeyInfo]) -> str:
    """One of pydantic's findings in the words of a person at a terminal."""
    if detail["type"] == "unexpected_keyword_argument":
        return f"unknown key{suggestion(key, described)}"
    info = described[key]
    if detail["type"] == "missing":
        return f"missing; add it ({info.meaning})"
    expected = info.allowed or detail["msg"].removeprefix("Input should be ").removeprefix("String should ")
    return f"got {shown(detail['input'])}, expected {expected} ({info.meaning})"


def shown(value: Any) -> str:
    """A value as its user would recognise it, cut if long."""
    if isinstance(value, str):
        text = f"{value!r} (text)"
    elif isinstance(value, bool):
        text = str(value).lower()
    else:
        text = "nothing (null)" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def suggestion(key: Key, described: Mapping[Key, KeyInfo]) -> str:
    """`; did you mean ...?` with the nearest known key, or where the list of keys is."""
    by_name = {dotted(known): known for known in described}
    if dotted(key) in by_name:
        *sections, last_name = by_name[dotted(key)]
        return f"; dots lead into sections on the command line only: indent {last_name} below {dotted(sections)}"
    near = difflib.get_close_matches(dotted(key), by_name, n=1, cutoff=0.75)
    if not near:
        last = {known[-1]: name for name, known in by_name.items()}
        near = [last[match] for match in difflib.get_close_matches(key[-1], last, n=1, cutoff=0.75)]
    return f"; did you mean {near[0]}?" if near else "; `python -m distgpt.train --help` lists all keys"


def conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """(key, problem) for values that are legal alone and wrong together."""
    model = config.model_config
    if model.n_embd % model.n_head:
        divisors = [n for n in range(1, model.n_embd + 1) if model.n_embd % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - model.n_head))
        yield (
            "model_config.n_head",
            f"got {model.n_head}, expected a divisor of model_config.n_embd = {model.n_embd}; {nearest} is the nearest",
        )
    if config.seq_len > model.n_positions:
        yield (
            "seq_len",
            f"got {config.seq_len}, but the model reads at most model_config.n_positions = {model.n_positions} tokens; "
            "lower seq_len or raise n_positions",
        )
    either = "lower one or raise the other"
    if config.num_warmup_steps > config.num_training_steps:
        most = f"expected at most num_training_steps = {config.num_training_steps}"
        yield "num_warmup_steps", f"got {config.num_warmup_steps}, {most}; {either}"
    if config.min_lr > config.max_lr:
        yield "min_lr", f"got {config.min_lr:g}, expected at most max_lr = {config.max_lr:g}; {either}"
    implied = config.batch_size * config.grad_accumulation_steps
    if config.grad_accumulation_steps > 1 and config.global_batch_size not in (None, implied):
        yield (
            "global_batch_size",
            f"got {config.global_batch_size}, but batch_size x grad_accumulation_steps = {implied}; "
            "leave out grad_accumulation_steps: the micro-steps follow from global_batch_size",
        )
    parallel = config.parallel
    if parallel.shard_ranks is not None and parallel.strategy != "hsdp":
        yield (
            "parallel.shard_ranks",
            f"got {parallel.shard_ranks} with parallel.strategy = {parallel.strategy}, expected strategy hsdp; "
            "leave it out or set the strategy",
        )
    first, last = config.profile.steps or (1, 1)
    if not first <= last < first + MOST_PROFILED:
        yield (
            "profile.steps",
            f"got [{first}, {last}], expected the first and the last of at most {MOST_PROFILED} steps, such as "
            f"[{first}, {first + 2}]",
        )
    for name in ("output_dir", "data", "tokenizer_encoding"):
        found = [c for c in getattr(config, name) or "" if c < " " or c == "\x7f"]
        if found:
            yield name, f"got the control character {found[0]!r}, expected a name or path without; remove it"


# Describing: the same dataclasses, as text.


@dataclasses.dataclass(frozen=True)
class KeyInfo:
    """What --help says of one key."""

    kind: str
    allowed: str
    """The values allowed, where pydantic's own words would not tell; else empty."""
    default: str
    meaning: str


KINDS = {int: "integer", float: "number", str: "text", bool: "true or false"}


def walk_keys(cls: type = Config, prefix: Key = ()) -> Iterator[tuple[Key, KeyInfo]]:
    """Every key with its description, sections included, in order of definition."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, field in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        kind, allowed, nested = describe_type(hints[name])
        if field.is_required():
            default = "required"
        elif nested is not None:
            default = ""
        else:
            default = "null" if field.default is None else str(field.default)
            default = default.lower() if isinstance(field.default, bool) else default
        if name == "device":
            allowed = "auto, cpu, cuda, cuda:N or mps"
        yield (*prefix, name), KeyInfo(kind, allowed, default, field.description or "")
        if nested is not None:
            yield from walk_keys(nested, (*prefix, name))


def describe_type(hint: Any) -> tuple[str, str, type | None]:
    """A type hint as (name for people, values allowed, the section's class if it is one)."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return describe_type(typing.get_args(hint)[0])
    if origin is Literal:
        options = ", ".join(typing.get_args(hint)[:-1]) + " or " + typing.get_args(hint)[-1]
        return options, options, None
    if origin in (typing.Union, types.UnionType):
        return describe_type(next(arm for arm in typing.get_args(hint) if arm is not type(None)))
    if origin is tuple:
        return "two integers", "two integers in brackets, such as [10, 12]", None
    if dataclasses.is_dataclass(hint):
        return "section", "a section of indented keys", typing.cast(type, hint)
    return KINDS[hint], "true or false" if hint is bool else "", None


def help_text() -> str:
    """Every key with its type, default and meaning, for --help."""
    lines = ["config keys (in the YAML file, or as key=value on the command line; dots lead into sections):"]
    for key, info in walk_keys():
        default = f", default {info.default}" if info.default not in ("", "required") else ""
        required = ", required" if info.default == "required" else ""
        lines.append(f"  {dotted(key)} ({info.kind}{required}{default})")
        lines.append(f"      {info.meaning}")
    return "\n".join(lines)


class Dumper(yaml.SafeDumper):
    """Writes YAML whose texts `load` reads back as texts: PyYAML itself would leave 1e5 unquoted."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Quote what looks like something else."""
        looks_else = text in CONSTANTS or text.lower() in YAML_1_1_BOOLEANS or NUMBER.fullmatch(text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if looks_else else None)


Dumper.add_representer(str, Dumper.represent_text)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load` reads back to the same value."""
    text: str = yaml.dump(dataclasses.asdict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return text


def config_parser(prog: str, description: str) -> Parser:
    """The command line that every command with a config shares: CONFIG [key=value ...]."""
    parser = Parser(
        prog=prog, description=description, epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=file_name, metavar="CONFIG", help="YAML file, such as configs/GPT-tiny.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a key of the file")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Print the resolved config and its batch equation."""
    parser = config_parser("python -m distgpt.config", "Check a config and print it with every default filled in.")
    parser.add_argument("--ranks", type=int, default=1, help="ranks to show the batch equation for (default 1)")
    parser.add_argument("--plan", action="store_true", help="print what the config needs on paper, not the config")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of each device (default 80)")
    options = parser.parse_intermixed_args(arguments)
    if not 1 <= options.ranks <= 2**20:
        raise ConfigError(f"command line: --ranks: got {options.ranks}, expected a number from 1 to {2**20}")
    if not 0 < options.gpu_memory <= 1e6:
        raise ConfigError(f"command line: --gpu-memory: got {options.gpu_memory}, expected GB above 0, such as 80")
    config = load(options.config, options.overrides)
    equation = config.batch_plan(options.ranks).equation(config.seq_len)
    if options.plan:
        print(equation)
        print(plan_on_paper(config, options.ranks, options.gpu_memory * 1e9))
    else:
        print(to_yaml(config), end="")
        print(f"# {equation}")


PLANNED_MACHINE = 8
"""Ranks of a machine, where a plan has to assume their number (for hsdp without shard_ranks)."""


def plan_on_paper(config: Config, ranks: int, device_bytes: float) -> str:
    """What the config needs of each rank under every strategy that `ranks` can run. `auto` precision counts as bf16."""
    from distgpt.tokenizer import load_tokenizer

    parallel, precision = config.parallel, "bf16" if config.precision == "auto" else config.precision
    if parallel.shard_ranks and ranks % parallel.shard_ranks:
        raise ConfigError(
            f"parallel.shard_ranks: got {parallel.shard_ranks} with {ranks} ranks, expected a divisor of {ranks}; "
            "change it, or --ranks"
        )
    work = config.work(load_tokenizer(config.tokenizer_encoding).n_vocab, ranks, precision)
    template = Layout(
        reshard_after_forward=parallel.reshard_after_forward,
        activation_checkpointing=config.activation_checkpointing,
        reduce_dtype=parallel.reduce_dtype,
    )
    columns = layouts(ranks, parallel.shard_ranks or PLANNED_MACHINE, template)
    flops = work.sizes.flops_per_token(config.seq_len)
    not_counted = [key for key in ("p_dropout", "mask_documents") if getattr(config, key)]
    return (
        f"{count(work.sizes.parameters, 'parameter')}, {flops:.3g} FLOPs a token, {flops * config.tokens_per_step:.3g} "
        f"a step; {precision}, activation_checkpointing {config.activation_checkpointing}\n"
        + table(work, columns, parallel.reduce_gradients, device_bytes)
        + "".join(f"\nnot counted: what {key} adds to the activations" for key in not_counted)
    )


if __name__ == "__main__":
    leave(run_command(main))
