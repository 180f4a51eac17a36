"""Configs: which values are accepted, how problems are reported, and the arithmetic of batches."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

import distgpt
from distgpt.config.__main__ import main
from distgpt.config.fields import MUTABLE, SECTION, Fraction, Rate, Size
from distgpt.config.help import help_text, keys_in_use, walk_keys
from distgpt.config.loader import config_from_dict, config_to_yaml, load_config
from distgpt.config.schema import RENAMED_KEYS, Config, flatten, mutable_keys
from distgpt.config.yaml_reader import join_key
from distgpt.data.sampler import BatchPlan
from distgpt.errors import ConfigError
from distgpt.models.architectures import GPT2Config
from distgpt.optim.optimizers import AdamWConfig
from distgpt.optim.schedules import SCHEDULES, learning_rate
from tests.conftest import REPO, Run, environment

TINY_CONFIG = REPO / "configs" / "GPT-tiny.yaml"
VALID = TINY_CONFIG.read_text()
CONFIGS = sorted((REPO / "configs").glob("*.yaml"))


def error_lines(text: str | bytes, tmp_path: Path, *overrides: str, config_type: type[Config] = Config) -> list[str]:
    """The lines of the error that loading a config raises."""
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides, config_type)
    return str(raised.value).replace(str(path), "bad.yaml").splitlines()


def with_value(key: str, value: str) -> str:
    """The valid config with the value of one key replaced, or with a line added."""
    lines = VALID.splitlines()
    matching = [i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
    indent = "  " if matching and lines[matching[0]].startswith("  ") else ""
    if matching:
        lines[matching[0]] = f"{indent}{key}: {value}"
    else:
        lines.append(f"{key}: {value}")
    return "\n".join(lines) + "\n"


def test_gpt_tiny_keeps_the_keys_and_values_of_the_exercise() -> None:
    config = load_config(TINY_CONFIG)
    assert (config.output_dir, config.tokenizer_encoding, config.device) == ("outputs/GPT-tiny", "gpt2", "auto")
    assert config.model_config == GPT2Config(n_embd=32, n_head=2, n_positions=128, n_layer=2)
    assert (config.batch_size, config.seq_len, config.grad_accumulation_steps) == (32, 128, 1)
    assert (config.num_warmup_steps, config.num_training_steps) == (10, 2000)
    assert (config.min_lr, config.max_lr) == (1e-4, 5e-4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_loads_and_begins_with_how_to_launch_it(path: Path) -> None:
    load_config(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("launch", "hardware", "duration", "loss"):
        assert any(line.split()[1:2] == [word] for line in header), f"{path.name} has no {word} line"


def test_a_resolved_config_loads_to_an_equal_config(tmp_path: Path) -> None:
    config = load_config(TINY_CONFIG, ["compile=on", "data=a b.npz", "max_lr=1e-5", "min_lr=0"])
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config


def test_overrides_with_dots_set_keys_of_sections() -> None:
    config = load_config(TINY_CONFIG, ["model_config.n_layer=4", "eval.every=7"])
    assert (config.model_config.n_layer, config.eval.every, config.model_config.n_embd) == (4, 7, 32)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("3", 3.0), ("1E-3", 1e-3), ("0.002", 0.002), (".5", 0.5)])
def test_numbers_are_read_in_every_yaml_notation(tmp_path: Path, text: str, value: float) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(with_value("max_lr", text))
    assert load_config(path).max_lr == value


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("batch_size", "0", "got 0, expected greater than or equal to 1"),
        ("batch_size", "-4", "got -4, expected greater than or equal to 1"),
        ("batch_size", "3.5", "got 3.5, expected a valid integer"),
        ("batch_size", "true", "got true, expected a valid integer"),
        ("batch_size", "null", "got nothing (null), expected a valid integer"),
        ("batch_size", "'32'", "got '32' (text), expected a valid integer"),
        ("batch_size", "0x20", "got '0x20' (text), expected a valid integer"),
        ("batch_size", "010", "got '010' (text), expected a valid integer"),
        ("batch_size", "1_000", "got '1_000' (text), expected a valid integer"),
        ("batch_size", "99999999999999999999", "expected less than or equal to"),
        ("batch_size", "[1, 2]", "expected a valid integer"),
        ("max_lr", "5e-4x", "got '5e-4x' (text), expected a valid number"),
        ("max_lr", ".nan", "expected a valid number"),
        ("max_lr", ".inf", "expected a valid number"),
        ("max_lr", "1e999", "expected a finite number"),
        ("max_lr", "-1e-4", "expected greater than or equal to 0"),
        ("max_lr", "50", "expected less than or equal to 10"),
        ("seed", "-1", "expected greater than or equal to 0"),
        ("p_dropout", "1", "expected less than 1"),
        ("device", "gpu", "got 'gpu' (text), expected auto, cpu, cuda, cuda:N or mps"),
        ("compile", "yes", "got 'yes' (text), expected auto, on or off"),
        ("precision", "fp16", "expected auto, bf16, tf32 or fp32"),
        ("output_dir", "yes", "got an unquoted yes, no, on or off"),
        ("output_dir", "''", "at least 1 character"),
        ("output_dir", "!!python/object/apply:os.system ['touch canary']", "got the tag"),
        ("output_dir", "!secret x", "got the tag '!secret'"),
        ("model_config", "5", "got 5, expected a section of indented keys"),
        ("seq_len", "4096", "reads at most model_config.n_positions = 128 tokens"),
        ("n_head", "3", "expected a divisor of model_config.n_embd = 32; 2 is the nearest"),
        ("num_warmup_steps", "2001", "expected at most num_training_steps = 2000"),
        ("min_lr", "1e-3", "expected at most max_lr = 0.0005"),
        ("lr_schedule", "cosin", "got 'cosin' (text), expected cosine, linear, wsd or constant; did you mean cosine?"),
        ("lr_decay_fraction", "0", "got 0, expected greater than 0"),
        ("model_type", "gtp2", "unknown key; did you mean model_config.model_type?"),
        ("n_layers", "2", "unknown key; did you mean model_config.n_layer?"),
        ("bogus_thing", "2", "unknown key; `python -m distgpt.train --help` lists all keys"),
    ],
)
def test_a_wrong_value_is_reported_in_one_line_with_its_location(
    tmp_path: Path, key: str, value: str, expected: str
) -> None:
    text = with_value(key, value)
    if key == "model_config":
        text = "\n".join(line for line in text.splitlines() if not line.startswith("  n_")) + "\n"
    (line,) = error_lines(text, tmp_path)
    line_number = next(i for i, row in enumerate(text.splitlines(), 1) if row.strip().startswith(f"{key}:"))
    assert line.startswith(f"bad.yaml:{line_number}: ")
    assert expected in line
    assert not (tmp_path / "canary").exists()


def test_every_misspelt_key_gets_a_suggestion(tmp_path: Path) -> None:
    for key, info in walk_keys():
        name = join_key(key)
        misspelt = name[:-2] + name[-1]  # without its last letter but one
        lines = error_lines(VALID, tmp_path, f"{misspelt}={'{}' if info.kind == 'section' else 1}")
        assert any(f"{misspelt}: unknown key; did you mean " in line for line in lines), (misspelt, lines)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = with_value("batch_size", "0").replace("max_lr: 5e-4", "max_lr: fast").replace("n_layer: 2", "n_layer: two")
    lines = error_lines(text, tmp_path, "sede=1", "device=tpu")
    for name in ("batch_size", "max_lr", "model_config.n_layer", "sede", "device"):
        assert any(f" {name}: " in line for line in lines), name
    assert len(lines) == 5


@pytest.mark.parametrize("key", ["output_dir", "seq_len", "max_lr"])
def test_a_missing_key_is_reported_with_its_name(tmp_path: Path, key: str) -> None:
    text = "\n".join(line for line in VALID.splitlines() if not line.startswith(key))
    (line,) = error_lines(text, tmp_path)
    assert f"{key}: missing; add it" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "expected a config"),
        (b"just words", "expected a config"),
        (b"- a\n- b\n", "expected a config"),
        (b"\xff\xfe\x00b", "not UTF-8 text (byte 0)"),
        (b"output_dir: a\xe9\n", "not UTF-8 text (byte 13)"),
        (b"output_dir: a\x00b\n", "not valid YAML"),
        (b"a: [1\nb: 2", "not valid YAML"),
        (b"a: 1\n\tb: 2", "not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"a: &x 1\nb: *x\n", "got an alias"),
        (b"a: " + b"[" * 5000, "bad.yaml"),
        (b"#" * 70_000, "larger than 65,536 bytes"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path: Path, text: bytes, expected: str) -> None:
    lines = error_lines(text, tmp_path)
    assert len(lines) == 1 and expected in lines[0]


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    (line,) = error_lines(VALID + "max_lr: 1e-3\n", tmp_path)
    assert "max_lr: given twice (first at bad.yaml:" in line


def test_bom_and_crlf_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    assert load_config(path) == load_config(TINY_CONFIG)


@pytest.mark.parametrize("override", ["max_lr", "=3", "fresh", "a.b=[", "x={", "max_lr.x=1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    assert any("command line" in line for line in error_lines(VALID, tmp_path, override))


@pytest.mark.parametrize("path", ["nowhere.yaml", "."])
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / path)


def test_commands_refuse_a_wrong_config_with_exit_code_2_and_no_traceback(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(with_value("batch_size", "0"))
    for command in ("config", "check", "train"):
        done = run(command, "bad.yaml")
        assert done.returncode == 2
        assert done.stderr.startswith("distgpt: error: bad.yaml:") and done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.yaml"]


def test_printing_a_config_needs_no_torch() -> None:
    code = "import sys; from distgpt.config.__main__ import main\n"
    code += "main(['configs/GPT-tiny.yaml', '--ranks', '4']); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "# 32 sequences (4,096 tokens) per step = 4 ranks x 8 sequences x 1 micro-step" in done.stdout


def test_help_lists_every_key_with_type_default_and_meaning() -> None:
    text = help_text()
    for key, info in walk_keys():
        assert f"  {join_key(key)} ({info.kind}" in text
        assert info.meaning and info.meaning in text
    assert "optimizer.beta2 (number, default 0.95)" in text


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize(("sequences", "batch_size"), [(32, 32), (32, 8), (33, 8), (1, 4), (5, 1), (100, 7)])
def test_ranks_and_micro_steps_divide_the_batch_exactly(ranks: int, sequences: int, batch_size: int) -> None:
    plan = BatchPlan(sequences, batch_size, ranks)
    shares = [plan.micro_batch_sizes(rank) for rank in range(ranks)]
    assert sum(map(sum, shares)) == sequences
    assert {len(share) for share in shares} == {plan.micro_steps}
    sizes = [size for share in shares for size in share]
    assert max(sizes) <= batch_size
    assert max(map(sum, shares)) - min(map(sum, shares)) <= 1
    assert plan.micro_steps == 1 or (plan.micro_steps - 1) * batch_size * ranks < sequences


def test_sequences_per_step_follow_from_the_config_alone(tmp_path: Path) -> None:
    config: Config = load_config(TINY_CONFIG, ["batch_size=8", "grad_accumulation_steps=4"])
    assert config.sequences_per_step == 32
    assert load_config(TINY_CONFIG, ["global_batch_size=30"]).sequences_per_step == 30
    lines = error_lines(VALID, tmp_path, "grad_accumulation_steps=2", "global_batch_size=30")
    assert "batch_size x grad_accumulation_steps = 64" in lines[0]


def test_half_empty_ranks_are_reported_with_the_batch_that_fills_them() -> None:
    line = BatchPlan(8, 8, 4).equation(16)
    assert line.endswith("(ranks are at most half full: global_batch_size=32 would fill them)")
    assert "half" not in BatchPlan(32, 8, 4).equation(16)


# Learning-rate schedules


def test_lr_schedule_allows_exactly_the_schedules_of_the_table() -> None:
    assert dict(walk_keys())["lr_schedule",].choices == tuple(SCHEDULES)
    for name in SCHEDULES:
        assert load_config(TINY_CONFIG, [f"lr_schedule={name}"]).schedule.name == name


def test_the_schedule_ends_at_num_training_steps_or_lr_decay_steps() -> None:
    assert load_config(TINY_CONFIG).schedule.num_decay_steps == 2000
    shorter = load_config(TINY_CONFIG, ["lr_decay_steps=1000"]).schedule
    assert shorter.num_decay_steps == 1000 and learning_rate(1500, shorter) == shorter.min_lr
    longer = load_config(TINY_CONFIG, ["lr_decay_steps=3000"]).schedule
    assert learning_rate(1999, longer) > longer.min_lr


def test_the_warm_up_is_no_longer_than_the_schedule(tmp_path: Path) -> None:
    (line,) = error_lines(VALID, tmp_path, "lr_decay_steps=9")
    assert "num_warmup_steps: got 10, expected at most lr_decay_steps = 9; lower one or raise the other" in line
    assert load_config(TINY_CONFIG, ["lr_decay_steps=10"]).schedule.num_decay_steps == 10


# Keys that may change on resume


def test_the_keys_that_may_change_on_resume() -> None:
    """All others determine what a run computes. Preflight compares what the batch keys and `data` result in."""
    sections = ("parallel", "eval", "checkpoint", "profile")
    expected = {
        *("output_dir", "device", "batch_size", "grad_accumulation_steps", "global_batch_size", "num_training_steps"),
        *("precision", "compile", "activation_checkpointing", "log_every", "max_minutes", "hang_minutes", "wandb"),
        *("data", "tensorboard", "lr_decay_steps", "lr_decay_fraction"),
        *(key for key in flatten(load_config(TINY_CONFIG)) if key.partition(".")[0] in sections),
    }
    assert mutable_keys() == expected
    assert not mutable_keys() & {"lr_schedule", "seed", "max_lr", "min_lr", "num_warmup_steps", "optimizer.beta1"}


# Renamed keys

OLD_VALUES = {"shard_ranks": 2, "compare_every": 7, "reduce_gradients": "each"}
"""Values of the section `parallel` under the old names."""


def test_old_names_are_read_in_files_and_overrides_and_saved_configs(tmp_path: Path) -> None:
    assert {f"parallel.{name}" for name in OLD_VALUES} == RENAMED_KEYS.keys()
    path = tmp_path / "old.yaml"
    path.write_text(VALID + yaml.safe_dump({"parallel": OLD_VALUES | {"strategy": "hsdp"}}))
    from_file = load_config(path)
    overrides = [f"parallel.{name}={value}" for name, value in OLD_VALUES.items()]
    section = "parallel={shard_ranks: 2, compare_every: 7, reduce_gradients: each, strategy: hsdp}"
    values = yaml.safe_load(config_to_yaml(load_config(TINY_CONFIG)))
    saved = config_from_dict(values | {"parallel": OLD_VALUES | {"strategy": "hsdp"}})
    for config in (from_file, load_config(TINY_CONFIG, [*overrides, "parallel.strategy=hsdp"]), saved):
        parallel = config.parallel
        assert (parallel.shard_size, parallel.replica_check_every, parallel.grad_sync) == (2, 7, "each")
    assert load_config(TINY_CONFIG, [section]).parallel == from_file.parallel
    assert load_config(path, ["parallel.shard_size=4"]).parallel.shard_size == 4
    assert "shard_ranks" not in config_to_yaml(from_file) and load_config(path, ["seed=0"]) == from_file


def test_problems_with_old_names_are_reported_under_the_new_ones(tmp_path: Path) -> None:
    (line,) = error_lines(VALID, tmp_path, "parallel.reduce_gradients=never")
    assert "parallel.grad_sync: got 'never' (text), expected auto, each or last" in line
    (line,) = error_lines(VALID + "parallel:\n  grad_sync: last\n  reduce_gradients: each\n", tmp_path)
    number = VALID.count("\n") + 2
    assert line.startswith(f"bad.yaml:{number + 1}: parallel.grad_sync: given twice (first at bad.yaml:{number});")
    assert "reduce_gradients is its old name; remove one" in line
    (line,) = error_lines(VALID, tmp_path, "parallel.compare_evry=3")
    assert "parallel.compare_evry: unknown key; did you mean parallel.replica_check_every?" in line


def test_a_saved_config_without_newer_keys_gets_their_defaults() -> None:
    config = load_config(TINY_CONFIG)
    values = yaml.safe_load(config_to_yaml(config))
    for name in ("lr_schedule", "lr_decay_steps", "lr_decay_fraction", "tensorboard"):
        del values[name]
    del values["model_config"]["model_type"], values["optimizer"]["name"]
    assert config_from_dict(values) == config


# Sections that are unions


@dataclass(frozen=True, kw_only=True, config=SECTION)
class RotaryConfig:
    """A second architecture."""

    model_type: Literal["qwen3"] = "qwen3"
    """Architecture."""
    n_embd: Size
    """Hidden size."""
    n_positions: Size
    """Longest sequence."""
    n_kv_head: Size
    """Key and value heads per layer."""
    rope_theta: float = 1e4
    """Base of the rotary frequencies."""

    def cross_field_errors(self) -> Iterator[tuple[str, str]]:
        """More heads than the hidden size are wrong."""
        if self.n_kv_head > self.n_embd:
            yield "n_kv_head", f"got {self.n_kv_head}, expected at most {self.n_embd}; lower it"


@dataclass(frozen=True, kw_only=True, config=SECTION)
class MuonConfig:
    """A second optimizer."""

    name: Literal["muon"] = "muon"
    """Optimizer."""
    momentum: Fraction = 0.95
    """Decay of the running mean of gradients."""
    scale: Rate = Field(default=1.0, json_schema_extra=MUTABLE)
    """Scale of the update."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class UnionConfig(Config):
    """The schema with two architectures and two optimizers."""

    model_config: Annotated[GPT2Config | RotaryConfig, Field(discriminator="model_type")]  # type: ignore[assignment]
    """The model."""
    optimizer: Annotated[AdamWConfig | MuonConfig, Field(discriminator="name")] = Field(  # type: ignore[assignment]
        default_factory=MuonConfig
    )
    """The optimizer."""


QWEN3 = "model_config={model_type: qwen3, n_embd: 8, n_positions: 128, n_kv_head: 2}"


def load_union(*overrides: str) -> Any:
    """GPT-tiny's config under the schema with unions."""
    return load_config(TINY_CONFIG, overrides, UnionConfig)


def test_the_discriminator_selects_the_member_of_a_union() -> None:
    config = load_union(QWEN3, "model_config.rope_theta=1e6", "optimizer={name: adamw, beta1: 0.8}")
    assert config.model_config == RotaryConfig(n_embd=8, n_positions=128, n_kv_head=2, rope_theta=1e6)
    assert config.optimizer == AdamWConfig(beta1=0.8)


def test_a_missing_discriminator_selects_the_default_member() -> None:
    """The type of the default if there is one, else the first member."""
    assert isinstance(load_union().model_config, GPT2Config)
    assert load_union().optimizer == MuonConfig()
    assert load_union("optimizer={momentum: 0.5}").optimizer == MuonConfig(momentum=0.5)


def test_help_lists_the_keys_of_every_member_below_its_discriminator() -> None:
    lines = help_text(UnionConfig).splitlines()
    discriminator = lines.index("  model_config.model_type (gpt2 or qwen3, default gpt2)")
    gpt2, qwen3 = (lines.index(f"  with model_config.model_type = {name}:") for name in ("gpt2", "qwen3"))
    assert discriminator < gpt2 < lines.index("    model_config.n_layer (integer, required)") < qwen3
    assert (
        qwen3
        < lines.index("    model_config.n_kv_head (integer, required)")
        < lines.index("  p_dropout (number, default 0.0)")
    )
    assert sum("model_config.model_type (" in line for line in lines) == 1
    assert sum("model_config.n_embd (" in line for line in lines) == 2
    assert "  optimizer.name (adamw or muon, default muon)" in lines


def test_keys_in_use_are_those_of_the_selected_members() -> None:
    values = {"model_config": {"model_type": "qwen3"}, "optimizer": {"name": "adamw"}}
    names = {join_key(key) for key in keys_in_use(values, UnionConfig)}
    assert {"model_config.n_kv_head", "model_config.n_embd", "optimizer.beta1", "eval.every"} <= names
    assert not names & {"model_config.n_head", "optimizer.momentum"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["model_config.model_type=gtp2"],
            "model_config.model_type: got 'gtp2' (text), expected gpt2 or qwen3; did you mean gpt2? (Architecture.)",
        ),
        (["model_config.model_type=3"], "model_config.model_type: got 3, expected gpt2 or qwen3 (Architecture.)"),
        (["model_config.model_type=null"], "model_config.model_type: got nothing (null), expected gpt2 or qwen3"),
        (["model_config.model_type=[gpt2]"], "model_config.model_type: got ['gpt2'], expected gpt2 or qwen3"),
        (["model_config=5"], "model_config: got 5, expected a section of indented keys (The model.)"),
        ([QWEN3, "model_config.n_kv_haed=2"], "n_kv_haed: unknown key; did you mean model_config.n_kv_head?"),
        ([QWEN3, "model_config.n_kv_head=0"], "model_config.n_kv_head: got 0, expected greater than or equal to 1"),
        ([QWEN3, "model_config.n_kv_head=9"], "model_config.n_kv_head: got 9, expected at most 8; lower it"),
        (
            [QWEN3, "model_config.n_head=9"],
            "model_config.n_head: unknown key; it belongs to model_config.model_type = gpt2",
        ),
        (["model_config.n_kv_head=2"], "n_kv_head: unknown key; it belongs to model_config.model_type = qwen3"),
        (["model_config={model_type: qwen3, n_embd: 8, n_positions: 128}"], "n_kv_head: missing; add it (Key and"),
        (["optimizer={nam: muon}"], "optimizer.nam: unknown key; did you mean optimizer.name?"),
        (["optimizer.momentm=0.9"], "optimizer.momentm: unknown key; did you mean optimizer.momentum?"),
    ],
)
def test_problems_in_a_union_are_reported_for_the_selected_member(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    (line,) = error_lines(VALID, tmp_path, *overrides, config_type=UnionConfig)
    assert line.startswith(("command line: ", "bad.yaml: ")) and expected in line


def test_a_resolved_config_with_unions_loads_to_an_equal_config(tmp_path: Path) -> None:
    config = load_union(QWEN3)
    path = tmp_path / "resolved.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path, (), UnionConfig) == config


def test_mutable_keys_include_those_of_every_member() -> None:
    assert mutable_keys(UnionConfig) == mutable_keys() | {"optimizer.scale"}


# The commands


def test_estimate_prints_what_each_strategy_needs_and_plan_is_its_old_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outputs = []
    for option in ("--estimate", "--plan"):
        main([str(TINY_CONFIG), option, "--ranks", "16", "p_dropout=0.1"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    lines = outputs[0].splitlines()
    assert lines[0].startswith("32 sequences (4,096 tokens) per step = 16 ranks x 2 sequences x 1 micro-step")
    assert " parameters, " in lines[1] and " FLOPs per token, " in lines[1]
    assert lines[2].split() == ["GB", "per", "rank", "ddp", "fsdp", "hsdp", "2", "x", "8"]
    assert lines[-1] == "not counted: the activations that p_dropout adds"


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ([], 2, "usage: distgpt COMMAND"),
        (["--help"], 0, "usage: distgpt COMMAND"),
        (["--version"], 0, f"distgpt {distgpt.__version__}\n"),
        (["config", "configs/GPT-tiny.yaml"], 0, "# 32 sequences"),
        (["trian"], 2, "distgpt: error: got the command 'trian', expected one of train, generate"),
    ],
)
def test_python_m_distgpt_runs_the_commands(arguments: list[str], code: int, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distgpt", *arguments],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code and expected in (done.stderr if "error" in expected else done.stdout), done
