"""Configs: what is accepted, what is refused in one line each, and the batch arithmetic."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distgpt import config as configs
from distgpt.config import Config
from distgpt.errors import ConfigError
from distgpt.plan import BatchPlan
from distgpt.source import dotted
from tests.conftest import REPO, Run, environment

GOOD = (REPO / "configs" / "GPT-tiny.yaml").read_text()
CONFIGS = sorted((REPO / "configs").glob("*.yaml"))


def problems(text: str | bytes, tmp_path: Path, *overrides: str) -> list[str]:
    """The lines of the error that a config raises."""
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as raised:
        configs.load(path, overrides)
    return str(raised.value).replace(str(path), "bad.yaml").splitlines()


def changed(key: str, value: str) -> str:
    """The good config with one line's value replaced (or a line added)."""
    lines = GOOD.splitlines()
    found = [i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
    indent = "  " if found and lines[found[0]].startswith("  ") else ""
    if found:
        lines[found[0]] = f"{indent}{key}: {value}"
    else:
        lines.append(f"{key}: {value}")
    return "\n".join(lines) + "\n"


def test_the_exercises_config_keeps_its_keys_and_values() -> None:
    config = configs.load(REPO / "configs" / "GPT-tiny.yaml")
    assert (config.output_dir, config.tokenizer_encoding, config.device) == ("outputs/GPT-tiny", "gpt2", "auto")
    assert config.model_config == configs.ModelConfig(n_embd=32, n_head=2, n_positions=128, n_layer=2)
    assert (config.batch_size, config.seq_len, config.grad_accumulation_steps) == (32, 128, 1)
    assert (config.num_warmup_steps, config.num_training_steps) == (10, 2000)
    assert (config.min_lr, config.max_lr) == (1e-4, 5e-4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_loads_and_opens_with_how_to_start_it(path: Path) -> None:
    configs.load(path)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("launch", "hardware", "duration", "loss"):
        assert any(line.split()[1:2] == [word] for line in head), f"{path.name} does not say its {word}"


def test_a_resolved_config_reads_back_to_itself(tmp_path: Path) -> None:
    config = configs.load(REPO / "configs" / "GPT-tiny.yaml", ["compile=on", "data=a b.npz", "max_lr=1e-5", "min_lr=0"])
    path = tmp_path / "config.yaml"
    path.write_text(configs.to_yaml(config))
    assert configs.load(path) == config


def test_overrides_reach_into_sections() -> None:
    config = configs.load(REPO / "configs" / "GPT-tiny.yaml", ["model_config.n_layer=4", "eval.every=7"])
    assert (config.model_config.n_layer, config.eval.every, config.model_config.n_embd) == (4, 7, 32)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("3", 3.0), ("1E-3", 1e-3), ("0.002", 0.002), (".5", 0.5)])
def test_numbers_are_numbers_however_yaml_writes_them(tmp_path: Path, text: str, value: float) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(changed("max_lr", text))
    assert configs.load(path).max_lr == value


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
        ("n_layers", "2", "unknown key; did you mean model_config.n_layer?"),
        ("bogus_thing", "2", "unknown key; `python -m distgpt.train --help` lists all keys"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_with_its_place(
    tmp_path: Path, key: str, value: str, expected: str
) -> None:
    text = changed(key, value)
    if key == "model_config":
        text = "\n".join(line for line in text.splitlines() if not line.startswith("  n_")) + "\n"
    (line,) = problems(text, tmp_path)
    number = next(i for i, row in enumerate(text.splitlines(), 1) if row.strip().startswith(f"{key}:"))
    assert line.startswith(f"bad.yaml:{number}: ")
    assert expected in line
    assert not (tmp_path / "canary").exists()


def test_every_key_with_a_letter_dropped_is_named(tmp_path: Path) -> None:
    for key, info in configs.walk_keys():
        name = dotted(key)
        misspelt = name[:-2] + name[-1]
        lines = problems(GOOD, tmp_path, f"{misspelt}={'{}' if info.kind == 'section' else 1}")
        assert any(f"{misspelt}: unknown key; did you mean " in line for line in lines), (misspelt, lines)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = changed("batch_size", "0").replace("max_lr: 5e-4", "max_lr: fast").replace("n_layer: 2", "n_layer: two")
    lines = problems(text, tmp_path, "sede=1", "device=tpu")
    for name in ("batch_size", "max_lr", "model_config.n_layer", "sede", "device"):
        assert any(f" {name}: " in line for line in lines), name
    assert len(lines) == 5


@pytest.mark.parametrize("key", ["output_dir", "seq_len", "max_lr"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    text = "\n".join(line for line in GOOD.splitlines() if not line.startswith(key))
    (line,) = problems(text, tmp_path)
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
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: bytes, expected: str) -> None:
    lines = problems(text, tmp_path)
    assert len(lines) == 1 and expected in lines[0]


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    (line,) = problems(GOOD + "max_lr: 1e-3\n", tmp_path)
    assert "max_lr: given twice (first at bad.yaml:" in line


def test_bom_and_crlf_are_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert configs.load(path) == configs.load(REPO / "configs" / "GPT-tiny.yaml")


@pytest.mark.parametrize("override", ["max_lr", "=3", "fresh", "a.b=[", "x={", "max_lr.x=1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    assert any("command line" in line for line in problems(GOOD, tmp_path, override))


@pytest.mark.parametrize("path", ["nowhere.yaml", "."])
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        configs.load(tmp_path / path)


def test_the_command_refuses_with_exit_code_2_and_no_traceback(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(changed("batch_size", "0"))
    for command in ("config", "check", "train"):
        done = run(command, "bad.yaml")
        assert done.returncode == 2
        assert done.stderr.startswith("distgpt: error: bad.yaml:") and done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.yaml"]


def test_printing_a_config_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['config', 'configs/GPT-tiny.yaml', '--ranks', '4']\n"
    code += "from distgpt import config; config.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "# 32 sequences (4,096 tokens) per step = 4 ranks x 8 sequences x 1 micro-step" in done.stdout


def test_help_lists_every_key_with_type_default_and_meaning() -> None:
    text = configs.help_text()
    for key, info in configs.walk_keys():
        assert f"  {dotted(key)} ({info.kind}" in text
        assert info.meaning and info.meaning in text
    assert "optimizer.beta2 (number, default 0.95)" in text


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize(("sequences", "batch_size"), [(32, 32), (32, 8), (33, 8), (1, 4), (5, 1), (100, 7)])
def test_ranks_and_micro_steps_share_the_batch_exactly(ranks: int, sequences: int, batch_size: int) -> None:
    plan = BatchPlan(sequences, batch_size, ranks)
    shares = [plan.micro_batches(rank) for rank in range(ranks)]
    assert sum(map(sum, shares)) == sequences
    assert {len(share) for share in shares} == {plan.micro_steps}
    sizes = [size for share in shares for size in share]
    assert max(sizes) <= batch_size
    assert max(map(sum, shares)) - min(map(sum, shares)) <= 1
    assert plan.micro_steps == 1 or (plan.micro_steps - 1) * batch_size * ranks < sequences


def test_the_batch_does_not_depend_on_ranks(tmp_path: Path) -> None:
    config: Config = configs.load(REPO / "configs" / "GPT-tiny.yaml", ["batch_size=8", "grad_accumulation_steps=4"])
    assert config.sequences_per_step == 32
    assert configs.load(REPO / "configs" / "GPT-tiny.yaml", ["global_batch_size=30"]).sequences_per_step == 30
    lines = problems(GOOD, tmp_path, "grad_accumulation_steps=2", "global_batch_size=30")
    assert "batch_size x grad_accumulation_steps = 64" in lines[0]


def test_half_empty_ranks_are_told_what_would_fill_them() -> None:
    line = BatchPlan(8, 8, 4).equation(16)
    assert line.endswith("(ranks at most half full: global_batch_size=32 would fill them)")
    assert "half" not in BatchPlan(32, 8, 4).equation(16)
