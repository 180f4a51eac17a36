"""`python -m distgpt.config CONFIG [key=value ...]`: print the resolved config and how its batch is divided.

With `--estimate`, print what a step needs under each strategy instead of the config. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from distgpt.config.help import config_parser
from distgpt.config.loader import config_to_yaml, load_config
from distgpt.config.schema import Config
from distgpt.data.sampler import BatchPlan
from distgpt.data.tokenizer import load_tokenizer
from distgpt.distributed.estimate import StepWorkload, candidate_layouts, format_table
from distgpt.distributed.layout import ParallelLayout
from distgpt.errors import ConfigError, exit_process, pluralize, run_command

ASSUMED_RANKS_PER_MACHINE = 8
"""For estimates of hsdp without parallel.shard_size."""

MAX_RANKS = 2**20


def main(arguments: Sequence[str]) -> None:
    """Check a config and print it with every default filled in."""
    parser = config_parser("python -m distgpt.config", str(main.__doc__))
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (default 1)")
    parser.add_argument(
        "--estimate",
        "--plan",
        action="store_true",
        help="print estimates of parameters, FLOPs, memory and communication, not the config",
    )
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of each device (default 80)")
    options = parser.parse_intermixed_args(arguments)
    if not 1 <= options.ranks <= MAX_RANKS:
        raise ConfigError(f"command line: --ranks: got {options.ranks}, expected a number from 1 to {MAX_RANKS}")
    if not 0 < options.gpu_memory <= 1e6:
        raise ConfigError(f"command line: --gpu-memory: got {options.gpu_memory}, expected GB above 0, such as 80")
    config = load_config(options.config, options.overrides)
    equation = BatchPlan.from_config(config, options.ranks).equation(config.seq_len)
    if options.estimate:
        print(equation)
        print(_estimate(config, options.ranks, options.gpu_memory * 1e9))
    else:
        print(config_to_yaml(config), end="")
        print(f"# {equation}")


def _estimate(config: Config, ranks: int, device_bytes: float) -> str:
    """What a step needs of each rank under every strategy that `ranks` can run. `auto` precision counts as bf16."""
    parallel, precision = config.parallel, "bf16" if config.precision == "auto" else config.precision
    if parallel.shard_size and ranks % parallel.shard_size:
        raise ConfigError(
            f"parallel.shard_size: got {parallel.shard_size} with {ranks} ranks, expected a divisor of {ranks}; "
            "change it, or --ranks"
        )
    model, n_vocab = config.model_config, load_tokenizer(config.tokenizer_encoding).n_vocab
    workload = StepWorkload(model, n_vocab, BatchPlan.from_config(config, ranks), config.seq_len, precision)
    template = ParallelLayout(
        reshard_after_forward=parallel.reshard_after_forward,
        activation_checkpointing=config.activation_checkpointing,
        reduce_dtype=parallel.reduce_dtype,
    )
    candidates = candidate_layouts(ranks, parallel.shard_size or ASSUMED_RANKS_PER_MACHINE, template)
    flops = model.flops_per_token(n_vocab, config.seq_len)
    not_counted = [key for key in ("p_dropout", "mask_documents") if getattr(config, key)]
    return (
        f"{pluralize(model.num_parameters(n_vocab), 'parameter')}, {flops:.3g} FLOPs per token, "
        f"{flops * config.tokens_per_step:.3g} per step; {precision}, "
        f"activation_checkpointing {config.activation_checkpointing}\n"
        + format_table(workload, candidates, parallel.grad_sync, device_bytes)
        + "".join(f"\nnot counted: the activations that {key} adds" for key in not_counted)
    )


if __name__ == "__main__":
    exit_process(run_command(main))
