"""Every mistake of a user is refused with one clear line and the exit code of its kind, and nothing is written.

A table of mistakes, each passed to the real command in this process (a sample also to a separate process), and a
fuzzer. `python -m tests.test_refusals 20000 [SEED]` fuzzes for longer and prints every config that was handled wrongly.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distgpt import train
from distgpt.cli import import_command
from distgpt.config.help import walk_keys
from distgpt.config.loader import config_to_yaml, load_config
from distgpt.config.yaml_reader import MAX_PROBLEMS, join_key
from distgpt.errors import run_command
from tests.conftest import REPO, command, environment

CONFIG = """
output_dir: run
tokenizer_encoding: bytes
model_config:
  n_embd: 16
  n_head: 2
  n_positions: 16
  n_layer: 1
data: t.npz
device: cpu
batch_size: 4
seq_len: 16
num_warmup_steps: 2
num_training_steps: 4
min_lr: 1e-4
max_lr: 1e-3
precision: fp32
compile: off
wandb: disabled
"""
IDS = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint16)

FUZZ_CASES = 500
MAX_SECONDS = 2.0
"""Processor time in which a command has to refuse a config."""

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")

Damage = Callable[[Path], object]
"""A change to a case's folder."""

CONFIG_ERROR, DATA_ERROR, CHECKPOINT_ERROR, ENVIRONMENT_ERROR = 2, 3, 4, 6


@dataclass(frozen=True)
class Case:
    """A mistake, in a folder with a valid `c.yaml` and `t.npz`."""

    rule: str
    """The check that detects it; no rule has more than three cases."""
    code: int
    expected: str
    """What a line of the error contains: the location and what was found."""
    arguments: Sequence[str] = ("c.yaml",)
    command: str = "check"
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    damage: Damage | None = None
    """A further change to the folder."""
    finished: bool = False
    """Whether `run` is a finished run of `c.yaml`."""
    variables: Mapping[str, str] = field(default_factory=dict)
    lines: int = 1

    @property
    def name(self) -> str:
        """The id of the test."""
        return f"{self.rule}: {self.expected}".encode("ascii", "backslashreplace").decode()[:100]


# Constructors of cases and damage


def whole_config(rule: str, content: str | bytes, expected: str) -> Case:
    """A whole config."""
    return Case(rule, CONFIG_ERROR, expected, files={"c.yaml": content})


def appended(rule: str, line: str, expected: str, lines: int = 1) -> Case:
    """The valid config with something after its last line."""
    return Case(rule, CONFIG_ERROR, expected, files={"c.yaml": CONFIG + line + "\n"}, lines=lines)


def config_value(rule: str, key: str, written: str, expected: str) -> Case:
    """One value of the config: in the file if it has the key, else on the command line."""
    pattern = rf"(?m)^( *{key.rpartition('.')[2]}:).*"
    if "\n" in written or not re.search(pattern, CONFIG):
        return override(rule, f"{key}={written}", expected=f"command line: {key}: {expected}")
    content = re.sub(pattern, lambda match: f"{match[1]} {written}", CONFIG, count=1)
    line_number = content[: content.index(f"{key.rpartition('.')[2]}: {written}")].count("\n") + 1
    return Case(rule, CONFIG_ERROR, f"c.yaml:{line_number}: {key}: {expected}", files={"c.yaml": content})


def parse_number(written: str) -> float | int:
    """The value that a config reads."""
    return int(written) if re.fullmatch("-?[0-9]+", written) else float(written)


def override(rule: str, *overrides: str, expected: str, lines: int = 1) -> Case:
    """Arguments after the valid config."""
    return Case(rule, CONFIG_ERROR, expected, ("c.yaml", *overrides), lines=lines)


def command_line(rule: str, name: str, *arguments: str, expected: str) -> Case:
    """Arguments of a command."""
    return Case(rule, CONFIG_ERROR, expected, arguments, name)


def npz(save: Callable[..., None] = np.savez, /, **arrays: object) -> bytes:
    """A token file with these arrays."""
    buffer = io.BytesIO()
    save(buffer, **{name: np.asarray(array) for name, array in arrays.items()})
    return buffer.getvalue()


def npy(array: object) -> bytes:
    """An .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), allow_pickle=True)
    return buffer.getvalue()


def zipped(content: bytes) -> bytes:
    """An .npz whose member `train.npy` has this content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("train.npy", content)
        archive.writestr("val.npy", npy(IDS))
    return buffer.getvalue()


def zip_bomb() -> bytes:
    """A compressed .npz that claims to contain a petabyte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.npy", npy(IDS))
        archive.filelist[0].file_size = 2**50
    return buffer.getvalue()


def with_token(index: int, token: int) -> bytes:
    """A token file in which one token is replaced."""
    ids = IDS.astype(np.int64)
    ids[index] = token
    return npz(train=ids, val=IDS[:50])


def flip_bit(raw: bytes, offset: int) -> bytes:
    """The same bytes with one bit flipped."""
    return raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1 :]


def edit_zip_entry(raw: bytes, offset: int, size: int, number: int) -> bytes:
    """The .npz with a number in the first entry of its directory replaced."""
    start = raw.index(b"PK\x01\x02") + offset
    return raw[:start] + number.to_bytes(size, "little") + raw[start + size :]


def token_file(rule: str, content: bytes, expected: str) -> Case:
    """The token file of a run."""
    return Case(rule, DATA_ERROR, f"t.npz: {expected}", files={"t.npz": content})


def inspected_file(rule: str, content: bytes, expected: str) -> Case:
    """A token file that the command `data` checks."""
    return Case(rule, DATA_ERROR, f"t.npy: {expected}", ("t.npy", "--tokenizer", "bytes"), "data", {"t.npy": content})


def vocabulary_file(rule: str, content: str, expected: str) -> Case:
    """A .tiktoken vocabulary file."""
    arguments = ("c.yaml", "tokenizer_encoding=v.tiktoken")
    return Case(rule, CONFIG_ERROR, f"tokenizer_encoding: {expected}", arguments, files={"v.tiktoken": content})


def evaluated_file(rule: str, content: bytes, expected: str) -> Case:
    """A file that `evaluate` reads."""
    return Case(rule, DATA_ERROR, expected, ("run", "--data", "x"), "evaluate", {"x": content}, finished=True)


def resume(rule: str, code: int, expected: str, *overrides: str, damage: Damage | None = None) -> Case:
    """A run that is resumed."""
    return Case(rule, code, expected, ("c.yaml", *overrides), damage=damage, finished=True)


def trained_run(rule: str, expected: str, damage: Damage, name: str = "evaluate") -> Case:
    """A finished run in which something is damaged."""
    arguments = ("run", "--prompt", "x") if name == "generate" else ("run",)
    return Case(rule, CHECKPOINT_ERROR, expected, arguments, name, damage=damage, finished=True)


def generate(rule: str, code: int, expected: str, *arguments: str, **files: str | bytes) -> Case:
    """`generate` with a valid run."""
    return Case(rule, code, expected, ("run", *arguments), "generate", files, finished=True)


def rank_variables(expected: str, **variables: str) -> Case:
    """A command that reads its rank from wrong environment variables."""
    rule = f"environment {expected}"
    return Case(rule, ENVIRONMENT_ERROR, expected, ("run",), "evaluate", finished=True, variables=variables)


def write(path: str, content: str | bytes) -> Damage:
    """Replaces the content of a file."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / path).write_bytes(raw)


def delete(path: str) -> Damage:
    """Deletes a file or folder."""

    def remove(folder: Path) -> None:
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return remove


def sparse(path: str, size: int) -> Damage:
    """Makes a file of zeros that occupies no disk space."""

    def grow(folder: Path) -> None:
        (folder / path).touch()
        os.truncate(folder / path, size)

    return grow


def truncate(pattern: str, size: int) -> Damage:
    """Truncates every file that matches a pattern."""

    def shorten(folder: Path) -> None:
        for file in sorted(folder.glob(pattern)):
            file.write_bytes(file.read_bytes()[:size])

    return shorten


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Changes tensors of the trained model."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "run" / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "run" / "model.safetensors")

    return rewrite


def edit_tokenizer(**changes: object) -> Damage:
    """Changes entries of the trained model's tokenizer."""

    def rewrite(folder: Path) -> None:
        path = folder / "run" / "tokenizer" / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return rewrite


def vocabulary_lines(count: int = 256, **changes: int) -> str:
    """A vocabulary file of the first `count` bytes, in which `b7=9` gives byte 7 the id 9."""
    ids = {value: changes.get(f"b{value}", value) for value in range(count)}
    return "".join(f"{base64.b64encode(bytes([value])).decode()} {token_id}\n" for value, token_id in ids.items())


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("canary",)


# The table

FILES = [
    command_line(
        "config unreadable", "check", "nowhere.yaml", expected="nowhere.yaml: cannot read the config: No such file"
    ),
    command_line("config unreadable", "config", ".", expected=".: cannot read the config: Is a directory"),
    command_line(
        "config unreadable", "check", "c.yaml/x", expected="c.yaml/x: cannot read the config: Not a directory"
    ),
    whole_config("config too large", "#" * 70_000, "c.yaml: larger than 65,536 bytes"),
    command_line("config too large", "config", "/dev/zero", expected="/dev/zero: larger than 65,536 bytes"),
    whole_config("config not UTF-8", b"\xff\xfe\x00b", "c.yaml: not UTF-8 text (byte 0)"),
    whole_config("config not UTF-8", b"output_dir: a\xe9\n", "c.yaml: not UTF-8 text (byte 13)"),
    whole_config("config not UTF-8", CONFIG.encode() + b"# \xe2\x98", "c.yaml: not UTF-8 text"),
    whole_config("config not keys", b"", "c.yaml: got no `key: value` lines"),
    whole_config("config not keys", b"- output_dir: a\n", "c.yaml: got no `key: value` lines"),
    command_line("config not keys", "check", "/dev/null", expected="/dev/null: got no `key: value` lines"),
    whole_config("yaml syntax", "a: [1\nb: 2", "c.yaml:2: not valid YAML"),
    whole_config("yaml syntax", "a: 1\n\tb: 2", "c.yaml:2: not valid YAML: found character '\\t'"),
    whole_config("yaml syntax", "a: 1\nb: 'x\n", "c.yaml:3: not valid YAML: found unexpected end of stream"),
    whole_config("yaml documents", CONFIG + "---\na: 1\n", "not valid YAML: but found another document"),
    whole_config(
        "yaml character", b"a: 1\noutput_dir: a\x00b\n", "c.yaml:2: not valid YAML: got the character '\\x00'"
    ),
    whole_config("yaml character", b"a: \x1b[31m\n", "c.yaml:1: not valid YAML: got the character '\\x1b'"),
    override("yaml character", "output_dir=a\x07b", expected="command line: output_dir: not valid YAML: got the"),
    whole_config("yaml escape", 'output_dir: "\\UFFFFFFFF"\n', "c.yaml: not valid YAML"),
    whole_config("yaml escape", "%YAML 1." + "9" * 5000 + "\n---\na: 1\n", "c.yaml: not valid YAML"),
    whole_config("yaml alias", "a: &x 1\nb: *x\n", "c.yaml:2: got an alias (*)"),
    whole_config("yaml alias", "a: &x {b: 1}\nc:\n  <<: *x\n", "c.yaml:3: got an alias (*)"),
    whole_config("yaml alias", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "c.yaml:2: got an alias (*)"),
    whole_config("yaml tag", "a: 1\nbatch_size: !!int '4'\n", "c.yaml:2: got the tag '!!int'"),
    whole_config(
        "yaml tag", "x: !!python/object/apply:os.mkdir [canary]\n", "c.yaml:1: got the tag '!!python/object/apply:os"
    ),
    whole_config("yaml tag", "!!str output_dir: run\n", "c.yaml:1: got the tag '!!str'"),
    override("yaml tag on the command line", "seed=!!str 5", expected="command line: seed: got the tag '!!str'"),
    override("yaml tag on the command line", "seed=! 5", expected="command line: seed: got the tag '!'"),
    whole_config("yaml depth", "a: " + "[" * 5000, "c.yaml:1: nested too deeply"),
    whole_config("yaml depth", "".join("  " * i + "a:\n" for i in range(12)), "nested too deeply"),
    override(
        "yaml depth", "a={b: {c: {d: {e: {f: {g: {h: {i: {}}}}}}}}}", expected="command line: a: nested too deeply"
    ),
    appended("key twice", "max_lr: 1e-3", "max_lr: given twice (first at c.yaml:16)"),
    appended("key twice", "optimizer: {beta1: 0.5, beta1: 0.6}", "optimizer.beta1: given twice (first at c.yaml:20)"),
    appended("key twice", "seed: 1\nseed: 2\nseed: 3", "c.yaml:21: seed: given twice"),
    appended("key unknown", "bathc_size: 4", "c.yaml:20: bathc_size: unknown key; did you mean batch_size?"),
    appended("key unknown", "eval: {evry: 4}", "eval.evry: unknown key; did you mean eval.every?"),
    override("key unknown", "n_layers=4", expected="n_layers: unknown key; did you mean model_config.n_layer?"),
    appended("key without suggestion", '"a\\nb": 1', "c.yaml:20: a\\nb: unknown key; `python -m distgpt.train --help`"),
    appended("key without suggestion", "? [1, 2]\n: 3", "?: unknown key"),
    appended("key without suggestion", "k" * 900 + ": 1", "kkk...: unknown key"),
    appended("key with a dot", "optimizer.beta1: 0.5", "optimizer.beta1: unknown key; dots lead into sections on the"),
    appended("key with a dot", "'eval.every': 5", "indent every below eval"),
    whole_config("key missing", CONFIG.replace("output_dir: run\n", ""), "c.yaml: output_dir: missing; add it"),
    whole_config("key missing", CONFIG.replace("  n_layer: 1\n", ""), "model_config.n_layer: missing; add it"),
    override("key missing", "model_config={n_head: 2, n_positions: 16, n_layer: 1}", expected="n_embd: missing; add"),
    Case("all at once", CONFIG_ERROR, "c.yaml: seq_len: missing", files={"c.yaml": "{}"}, lines=8),
    override("all at once", "batch_size=0", "seed=x", "max_lr=fast", "sede=1", expected="sede: unknown key", lines=4),
    override("all at once", "seq_len=17", "min_lr=1", expected="min_lr: got 1, expected at most max_lr", lines=2),
    appended(
        "at most 20 problems",
        "".join(f"key{i}: 1\n" for i in range(3000)),
        "c.yaml: and 2,980 more problems, not shown; fix these first",
        lines=MAX_PROBLEMS + 1,
    ),
    command_line(
        "path on one line", "check", "a\nb.yaml", expected="argument CONFIG: got 'a\\nb.yaml', expected a path"
    ),
    command_line("path on one line", "data", "", expected="argument PATH: got '', expected a path"),
    command_line("path on one line", "evaluate", "run\n", expected="argument RUN: got 'run\\n'"),
]

INTEGERS = {
    # key: (wrong type, too small, too large); the wrong types include YAML's surprises
    "model_config.n_embd": ("0x10", "0", "65537"),
    "model_config.n_head": ("02", "0", "4097"),
    "model_config.n_positions": ("1_6", "-16", "1048577"),
    "model_config.n_layer": ("true", "-1", "4097"),
    "batch_size": ("'4'", "0", "1048577"),
    "seq_len": ("0o20", "0", "99999999999999999999"),
    "grad_accumulation_steps": ("1:30", "0", "1048577"),
    "global_batch_size": ("4.0", "0", "1073741825"),
    "num_warmup_steps": ("1e1", "-1", "1000000001"),
    "num_training_steps": ("null", "0", "1000000001"),
    "lr_decay_steps": ("2e3", "0", "1000000001"),
    "seed": ("2001-01-01", "-1", "9223372036854775808"),
    "log_every": ("1,000", "0", "1" + "0" * 30),
    "eval.every": ("[5]", "0", "1000000001"),
    "eval.max_tokens": ("{a: 1}", "0", "1000000000001"),
    "checkpoint.every": ("never", "0", "1000000001"),
    "checkpoint.keep": ("~", "0", "1000001"),
    "parallel.shard_size": ("0b11", "0", "1048577"),
}
NUMBERS = {
    "p_dropout": ("1/2", "-0.1", "1"),
    "min_lr": ("10%", "-1e-9", "11"),
    "max_lr": ("1e-3x", "-1", "10.1"),
    "optimizer.beta1": (".nan", "-0.5", "1.0"),
    "optimizer.beta2": ("true", "-1e-300", "1"),
    "optimizer.eps": ("'1e-8'", "0", "1.5"),
    "optimizer.weight_decay": ("-.inf", "-1", "1e300"),
    "optimizer.grad_clip": ("off", "0", "1e10"),
    "lr_decay_fraction": ("20%", "0", "1.1"),
    "max_minutes": ("1:30", "0", "1e7"),
    "hang_minutes": ("null", "-15", "1e7"),
}
OUT_OF_ANY_RANGE = {"integer": ("x", "-1", "1" + "0" * 30), "number": ("x", "-1", "1e300")}
VALUES = [
    config_value(
        f"{join_key(key)}: {part}",
        join_key(key),
        wrong,
        f"got {parse_number(wrong)}, expected {part}" if part else "got ",
    )
    for key, info in walk_keys()
    if info.kind in OUT_OF_ANY_RANGE
    for part, wrong in zip(
        ("", "greater than", "less than"),
        (INTEGERS | NUMBERS).get(join_key(key), OUT_OF_ANY_RANGE[info.kind]),
        strict=True,
    )
]
VALUES += [
    config_value("not finite", "max_lr", "1e999", "got inf, expected a finite number"),
    config_value("not finite", "optimizer.grad_clip", "9e9999", "got inf, expected a finite number"),
    config_value("not finite", "hang_minutes", "-1e999", "got -inf, expected a finite number"),
    config_value("mask_documents type", "mask_documents", "yes", "got 'yes' (text), expected true or false"),
    config_value("mask_documents type", "mask_documents", "1", "got 1, expected true or false"),
    config_value("mask_documents type", "mask_documents", "TRUE", "got 'TRUE' (text), expected true or false"),
    config_value("reshard type", "parallel.reshard_after_forward", "0.0", "got 0.0, expected true or false"),
    config_value("precision choice", "precision", "fp16", "got 'fp16' (text), expected auto, bf16, tf32 or fp32"),
    config_value("precision choice", "precision", "[fp32]", "got ['fp32'], expected auto, bf16"),
    config_value("compile choice", "compile", "true", "got true, expected auto, on or off"),
    config_value("compile choice", "compile", "'on '", "got 'on ' (text), expected auto, on or off"),
    config_value("checkpointing choice", "activation_checkpointing", "null", "got nothing (null), expected none, full"),
    config_value(
        "strategy choice", "parallel.strategy", "zero3", "got 'zero3' (text), expected auto, none, ddp, fsdp or hsdp"
    ),
    config_value("strategy choice", "parallel.strategy", "FSDP", "got 'FSDP' (text), expected auto"),
    config_value(
        "gradient synchronization choice",
        "parallel.grad_sync",
        "never",
        "got 'never' (text), expected auto, each or last",
    ),
    config_value("reduce dtype choice", "parallel.reduce_dtype", "fp16", "got 'fp16' (text), expected fp32 or bf16"),
    config_value(
        "schedule choice", "lr_schedule", "cosin", "got 'cosin' (text), expected cosine, linear, wsd or constant"
    ),
    config_value(
        "schedule choice", "lr_schedule", "null", "got nothing (null), expected cosine, linear, wsd or constant"
    ),
    config_value("architecture choice", "model_config.model_type", "gtp2", "got 'gtp2' (text), expected gpt2"),
    config_value("optimizer choice", "optimizer.name", "sgd", "got 'sgd' (text), expected adamw"),
    config_value("tensorboard type", "tensorboard", "on", "got 'on' (text), expected true or false"),
    config_value("wandb choice", "wandb", "no", "got 'no' (text), expected auto, online, offline or disabled"),
    config_value("output_dir text", "output_dir", "5", "got 5, expected a valid string"),
    config_value("output_dir text", "output_dir", "''", "got '' (text), expected"),
    config_value("output_dir text", "output_dir", '"\\ud800"', "got '\\ud800' (text), expected"),
    config_value("output_dir length", "output_dir", "x" * 5000, "got 'xxxx"),
    config_value("data text", "data", "[a, b]", "got ['a', 'b'], expected a valid string"),
    config_value("data text", "data", "1e3", "got 1000.0, expected a valid string"),
    config_value("tokenizer text", "tokenizer_encoding", "null", "got nothing (null), expected a valid string"),
    config_value("unquoted yes", "output_dir", "yes", "got an unquoted yes, no, on or off"),
    config_value("unquoted yes", "tokenizer_encoding", "Off", "got an unquoted yes, no, on or off"),
    override("unquoted yes", "data=n", expected="command line: data: got an unquoted yes"),
    config_value("device name", "device", "gpu", "got 'gpu' (text), expected auto, cpu, cuda, cuda:N or mps"),
    config_value("device name", "device", "cuda:-1", "got 'cuda:-1' (text), expected auto"),
    config_value("device name", "device", '"cpu\\n"', "got 'cpu\\n' (text), expected auto"),
    override("section type", "optimizer=5", expected="optimizer: got 5, expected a section of indented keys"),
    override("section type", "eval=[1]", expected="eval: got [1], expected a section of indented keys"),
    override("section type", "checkpoint=", expected="checkpoint: got nothing (null), expected a section"),
]

VALUES += [
    config_value(
        "profile.steps", "profile.steps", wrong, f"got {got}, expected two integers in brackets, such as [10, 12]"
    )
    for wrong, got in [("10", "10"), ("[a, 2]", "'a' (text)"), ("[1, 2, 3]", "[1, 2, 3]")]
]

TOGETHER = [
    config_value(
        "steps in order", "profile.steps", "[12, 10]", "got [12, 10], expected the first and the last of at most"
    ),
    config_value(
        "steps in order", "profile.steps", "[1, 101]", "got [1, 101], expected the first and the last of at most"
    ),
    config_value(
        "heads divide n_embd", "model_config.n_head", "3", "got 3, expected a divisor of model_config.n_embd = 16"
    ),
    override("heads divide n_embd", "model_config.n_embd=17", expected="n_head: got 2, expected a divisor"),
    config_value(
        "sequence fits the model", "seq_len", "17", "got 17, but the model reads at most model_config.n_positions = 16"
    ),
    config_value(
        "warm-up within the schedule", "num_warmup_steps", "5", "got 5, expected at most num_training_steps = 4"
    ),
    override(
        "warm-up within the schedule",
        "lr_decay_steps=1",
        expected="num_warmup_steps: got 2, expected at most lr_decay_steps = 1",
    ),
    config_value("rates in order", "min_lr", "2e-3", "got 0.002, expected at most max_lr = 0.001"),
    override(
        "global batch consistent",
        "global_batch_size=9",
        "grad_accumulation_steps=2",
        expected="global_batch_size: got 9, but batch_size x grad_accumulation_steps = 8",
    ),
    override("shard size needs hsdp", "parallel.shard_size=2", expected="got 2 with parallel.strategy = auto"),
    override("shard size needs hsdp", "parallel={strategy: fsdp, shard_size: 2}", expected="parallel.strategy = fsdp"),
    config_value("control character", "output_dir", '"a\\nb"', "got the control character '\\n'"),
    config_value("control character", "data", '"a\\0b"', "got the control character '\\x00'"),
    config_value("control character", "tokenizer_encoding", '"\\e[31m"', "got the control character '\\x1b'"),
]

COMMAND_LINES = [
    override("override form", "max_lr", expected="command line: got 'max_lr', expected key=value"),
    override("override form", "=3", expected="command line: got '=3', expected key=value"),
    override("override form", "fresh", expected="options start with --, as in --fresh"),
    override("override syntax", "max_lr=[", expected="command line: max_lr: not valid YAML"),
    override("override syntax", "seed={", "log_every=0", expected="command line: seed: not valid YAML", lines=2),
    override("override syntax", "data=@x", expected="command line: data: not valid YAML: found character '@'"),
    override("override below a value", "max_lr.x=1", expected="max_lr.x: max_lr is a single value and has no keys"),
    override("override below a value", "data.a.b=1", expected="data.a.b: data is a single value"),
    override("override depth", "a" + ".b" * 9 + "=1", expected="expected at most 8 names"),
    override("override of an unknown section", "sched.every=1", expected="command line: sched: unknown key"),
    override("override of an unknown section", "a\nb=1", expected="command line: a\\nb: unknown key"),
    override("override of an unknown section", "eval..every=1", expected="command line: eval.: unknown key"),
    command_line(
        "option unknown", "check", "c.yaml", "--bogus", expected="command line: unrecognized arguments: --bogus"
    ),
    command_line("option unknown", "data", "t.npz", "a\nb", expected="command line: unrecognized arguments: a\\nb"),
    command_line("option unknown", "generate", "run", "--prompt", "x", "-k", expected="unrecognized arguments: -k"),
    command_line("argument missing", "check", expected="the following arguments are required: CONFIG"),
    command_line("argument missing", "evaluate", expected="the following arguments are required: RUN"),
    command_line("argument missing", "data", "--seq-len", "5", expected="the following arguments are required: PATH"),
    command_line(
        "option without value", "check", "c.yaml", "--from", expected="argument --from: expected one argument"
    ),
    command_line(
        "option without value", "evaluate", "run", "--data", expected="argument --data: expected one argument"
    ),
    command_line(
        "option with value", "check", "c.yaml", "--fresh=1", expected="argument --fresh: ignored explicit argument"
    ),
    command_line(
        "option ambiguous", "check", "c.yaml", "--fr", expected="ambiguous option: --fr could match --fresh, --from"
    ),
    command_line(
        "option not an integer", "config", "c.yaml", "--ranks", "3.5", expected="--ranks: invalid int value: '3.5'"
    ),
    command_line(
        "option not an integer", "data", "t.npz", "--seq-len", "x\ny", expected="--seq-len: invalid int value: 'x\\ny'"
    ),
    command_line(
        "option not an integer",
        "generate",
        "run",
        "--prompt",
        "x",
        "--seed",
        "9" * 5000,
        expected="--seed: invalid int",
    ),
    command_line(
        "option not a number", "config", "c.yaml", "--gpu-memory", "80GB", expected="invalid float value: '80GB'"
    ),
    command_line(
        "ranks range", "config", "c.yaml", "--ranks", "0", expected="--ranks: got 0, expected a number from 1"
    ),
    command_line(
        "ranks range", "config", "c.yaml", "--estimate", "--ranks", "1048577", expected="--ranks: got 1048577"
    ),
    command_line(
        "memory range", "config", "c.yaml", "--gpu-memory", "0", expected="--gpu-memory: got 0.0, expected GB above 0"
    ),
    command_line(
        "memory range", "config", "c.yaml", "--estimate", "--gpu-memory", "nan", expected="--gpu-memory: got nan"
    ),
    command_line("memory range", "config", "c.yaml", "--plan", "--gpu-memory", "inf", expected="--gpu-memory: got inf"),
    command_line("window length", "data", "t.npz", "--seq-len", "0", expected="--seq-len: got 0, expected at least 1"),
    command_line(
        "shard size divides ranks",
        *("config", "c.yaml", "parallel={strategy: hsdp, shard_size: 4}", "--estimate", "--ranks", "6"),
        expected="parallel.shard_size: got 4 with 6 ranks, expected a divisor of 6",
    ),
]

MACHINE = [
    Case("output_dir a file", 6, "output_dir: c.yaml is a file, expected a folder", ("c.yaml", "output_dir=c.yaml")),
    Case("output_dir a file", 6, "c.yaml is a file, expected a folder", ("c.yaml", "output_dir=c.yaml/a/b")),
    Case("output_dir a file", 6, "output_dir: /dev/null is a file", ("c.yaml", "output_dir=/dev/null/run")),
    Case("output_dir read-only", 6, "output_dir: cannot write to /proc: ", ("c.yaml", "output_dir=/proc/run")),
    Case("output_dir read-only", 6, "output_dir: cannot write to ", ("c.yaml", f"output_dir={'x' * 300}")),
    Case(
        "tokenizer download",
        ENVIRONMENT_ERROR,
        "tokenizer_encoding: o200k_base is not on this machine and its download failed",
        ("c.yaml", "tokenizer_encoding=o200k_base"),
        variables={"TIKTOKEN_CACHE_DIR": "cache", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""},
    ),
    rank_variables("environment: got RANK without WORLD_SIZE", RANK="0"),
    rank_variables("environment: got WORLD_SIZE without RANK", WORLD_SIZE="2"),
    rank_variables("environment: got LOCAL_RANK without RANK, WORLD_SIZE", LOCAL_RANK="0"),
    rank_variables("expected whole numbers", RANK="0", WORLD_SIZE="two"),
    rank_variables("environment: got RANK=2, expected 0 to 1", RANK="2", WORLD_SIZE="2"),
    rank_variables("environment: got RANK=-1", RANK="-1", WORLD_SIZE="2"),
    rank_variables("WORLD_SIZE=0", RANK="0", WORLD_SIZE="0"),
    rank_variables("process group: could not reach the other ranks", RANK="0", WORLD_SIZE="1"),
    Case("stale rank", 2, "x: unknown key", ("c.yaml", "x=1"), variables={"LOCAL_RANK": "x"}),
    Case("stale rank", 2, "x: unknown key", ("c.yaml", "x=1"), variables={"LOCAL_RANK": "1"}),
    Case("device missing", 6, "device: got cuda:", ("run", "--device", "cuda:9999"), "evaluate", finished=True),
    generate("device missing", 6, "device: got cuda:", "--prompt", "x", "--device", "cuda:9999"),
    generate("device unknown", 2, "device: got 'tpu', expected auto", "--prompt", "x", "--device", "tpu"),
    Case(
        "device unknown",
        2,
        "device: got 'cuda:', expected auto",
        ("run", "--device", "cuda:"),
        "evaluate",
        finished=True,
    ),
]

GOOD_NPZ = npz(train=IDS, val=IDS[:50])
FLIPPED_NPZ = flip_bit(GOOD_NPZ, GOOD_NPZ.index(IDS.tobytes()) + 200)
PACKED_NPZ = npz(np.savez_compressed, train=IDS, val=IDS[:50])
DATA = [
    Case("tokens unreadable", 3, "nowhere.npz: cannot read: No such file", ("c.yaml", "data=nowhere.npz")),
    Case("tokens unreadable", 3, "t.npz/x: cannot read: Not a directory", ("c.yaml", "data=t.npz/x")),
    Case("tokens unreadable", 3, "xxx: cannot read: File name too long", ("c.yaml", f"data={'x' * 300}")),
    Case("tokens not a file", 3, ".: got a folder without train.bin or val.bin, expected", ("c.yaml", "data=.")),
    Case("tokens not a file", 3, "/dev/zero: got a device or pipe, expected", ("/dev/zero",), "data"),
    token_file("tokens of another kind", b"", "got 0 bytes in an unknown format, expected"),
    token_file("tokens of another kind", GOOD_NPZ[:1], "got 1 bytes in an unknown format, expected"),
    token_file("tokens of another kind", b"<!DOCTYPE html>", "got 15 bytes in an unknown format"),
    token_file("npz cut short", GOOD_NPZ[:40], "damaged .npz (40 bytes: File is not a zip file)"),
    token_file("npz cut short", GOOD_NPZ[: len(GOOD_NPZ) // 2], "damaged .npz"),
    token_file("npz cut short", GOOD_NPZ[:-1], "damaged .npz"),
    token_file("npz damaged", flip_bit(GOOD_NPZ, GOOD_NPZ.index(b"PK\x01\x02")), "damaged .npz"),
    token_file("npz damaged", edit_zip_entry(GOOD_NPZ, 10, 2, 99), "damaged .npz"),
    token_file("npz damaged", flip_bit(GOOD_NPZ, 1), "got 1,"),
    token_file("compressed npz damaged", flip_bit(PACKED_NPZ, 200), "damaged .npz"),
    token_file("compressed npz damaged", edit_zip_entry(PACKED_NPZ, 16, 4, 7), "damaged .npz"),
    token_file("compressed npz damaged", edit_zip_entry(PACKED_NPZ, 10, 2, 99), "damaged .npz"),
    token_file(
        "compressed npz too large", zip_bomb(), "train.npy is compressed and needs 1,125,899,906,842,624 bytes unpacked"
    ),
    token_file("arrays missing", npz(train=IDS), "has arrays train, expected train and val; add val"),
    token_file("arrays missing", npz(**{"a\nb": IDS}), "has arrays a\\nb, expected train and val; add train"),
    token_file("arrays missing", npz(), "has arrays none"),
    token_file("npy for npz", npy(IDS), "has arrays tokens, expected train and val"),
    token_file("array type", npz(train=IDS / 2, val=IDS), "train is an array of float64"),
    token_file("array type", npz(train=IDS, val=IDS > 9), "val is an array of bool"),
    token_file("array type", npz(train=np.array(["a", "b"]), val=IDS), "train is an array of <U1"),
    token_file(
        "array shape", npz(train=IDS.reshape(20, 20), val=IDS), "train is an array of uint16 with shape (20, 20)"
    ),
    token_file("array shape", npz(train=np.uint16(5), val=IDS), "train is an array of uint16 with shape ()"),
    token_file(
        "array of objects", npz(train=np.array([Payload()], dtype=object), val=IDS), "train holds Python objects"
    ),
    inspected_file("array of objects", npy(np.array([Payload()], dtype=object)), "tokens holds Python objects"),
    token_file("header", zipped(b"no header at all"), "train: invalid .npy header"),
    token_file("header", zipped(npy(IDS)[:20]), "train: invalid .npy header"),
    token_file("header", zipped(npy(IDS).replace(b"(400,)", b"(-40,)")), "train: invalid .npy header"),
    token_file(
        "header with a wrong size", zipped(npy(IDS).replace(b"(400,), } ", b"(4000,), }")), "train needs bytes up to 8,"
    ),
    token_file(
        "header with a wrong size",
        zipped(npy(IDS).replace(b"(400,), }      ", b"(400000000,), }")),
        "train needs bytes",
    ),
    inspected_file("header with a wrong size", npy(IDS)[:-1], "tokens needs bytes up to 928, but the file ends at 927"),
    token_file("id outside", with_token(0, 257), "train[0] is token 257, expected 0 to 256"),
    token_file("id outside", with_token(399, -1), "train[399] is token -1"),
    token_file("id outside", with_token(217, 2**40), "train[217] is token 1099511627776"),
    token_file("validation id outside", npz(train=IDS, val=IDS + 200), "val["),
    inspected_file("validation id outside", npy(IDS.astype(np.uint64) - np.uint64(300)), "tokens["),
    token_file("no tokens", npz(train=IDS[:0], val=IDS), "train has 0 tokens, expected at least 2"),
    token_file("no tokens", npz(train=IDS, val=IDS[:1]), "val has 1 tokens, expected at least 2"),
    token_file("too few tokens", npz(train=IDS[:64], val=IDS), "train has 64 tokens, expected at least 65"),
    Case("too few tokens", 3, "train has 400 tokens, expected", ("c.yaml", "global_batch_size=1073741824")),
    token_file("checksum", FLIPPED_NPZ, "train has checksum"),
    Case(
        "checksum",
        3,
        "t.npz: train has checksum",
        ("t.npz",),
        "data",
        {"t.npz": FLIPPED_NPZ},
    ),
    inspected_file("file without arrays", npz(), "holds no arrays, expected train and val"),
    evaluated_file("file without arrays", npz(), "x: holds no arrays, expected val"),
    evaluated_file("text too short", b"", "x: text has 0 tokens, expected at least 2"),
    evaluated_file("text too short", b"x", "x: text has 1 tokens, expected at least 2"),
    evaluated_file("text not UTF-8", b"abc\xff", "x: neither a token file nor UTF-8 text (byte 3)"),
    evaluated_file("evaluated tokens cut short", GOOD_NPZ[:-9], "x: damaged .npz"),
    evaluated_file(
        "evaluated tokens damaged", flip_bit(GOOD_NPZ, GOOD_NPZ.rindex(IDS[:50].tobytes()) + 20), "x: val has checksum"
    ),
    evaluated_file("evaluated id outside", npy(IDS + 200), "x: tokens["),
    Case("text unreadable", 3, "nowhere: cannot read", ("run", "--data", "nowhere"), "evaluate", finished=True),
    Case("text not a file", 3, "run: got a folder or device", ("run", "--data", "run"), "evaluate", finished=True),
    Case(
        "text not a file",
        3,
        "/dev/zero: got a folder or dev",
        ("run", "--data", "/dev/zero"),
        "evaluate",
        finished=True,
    ),
    Case(
        "the run's tokens missing", 3, "t.npz: cannot read", ("run",), "evaluate", damage=delete("t.npz"), finished=True
    ),
    generate("prefixes unreadable", 3, "nowhere: cannot read", "--prefixes", "nowhere"),
    generate("prefixes unreadable", 3, "run: cannot read: Is a directory", "--prefixes", "run"),
    generate("prefixes a device", 3, "/dev/zero: got a device", "--prefixes", "/dev/zero"),
    generate("prefixes not UTF-8", 3, "p: not UTF-8 text (byte 0)", "--prefixes", "p", p=b"\xff"),
    generate("prefixes empty", 3, "p: has no lines", "--prefixes", "p", p=b"\n\n"),
    generate("prefixes form", 3, "p:2: got 'x', expected", "--prefixes", "p", p='{"prefix": "a"}\nx\n'),
    generate("prefixes form", 3, "p:1: got", "--prefixes", "p", p='{"prefix": 5}'),
    generate("prefixes form", 3, "p:1: got", "--prefixes", "p", p="[" * 100_000),
]

TOKENIZERS = [
    vocabulary_file("vocabulary bytes", "", "v.tiktoken: no token for byte 0 (and 255 others)"),
    vocabulary_file("vocabulary bytes", vocabulary_lines(255), "v.tiktoken: no token for byte 255"),
    vocabulary_file("vocabulary lines", "AA== 0\nnonsense\n", "v.tiktoken: line 2: got b'nonsense'"),
    vocabulary_file("vocabulary lines", vocabulary_lines()[:-4], "v.tiktoken: line 256: got b'/w== '"),
    vocabulary_file("vocabulary lines", "AA== 0\n*** 1\n", "v.tiktoken: line 2: got b'*** 1'"),
    vocabulary_file("vocabulary ids", vocabulary_lines(b7=-1), "v.tiktoken: the ids of its 256 tokens are not 0, 1, 2"),
    vocabulary_file("vocabulary ids", vocabulary_lines(b7=8), "v.tiktoken: the ids of its 256 tokens are not 0, 1, 2"),
    override(
        "vocabulary unreadable", "tokenizer_encoding=no.tiktoken", expected="cannot read no.tiktoken: No such file"
    ),
    Case(
        "vocabulary not a file",
        CONFIG_ERROR,
        "tokenizer_encoding: d.tiktoken: a folder or device",
        ("c.yaml", "tokenizer_encoding=d.tiktoken"),
        damage=lambda folder: (folder / "d.tiktoken").mkdir(),
    ),
    Case(
        "vocabulary not a file",
        CONFIG_ERROR,
        "tokenizer_encoding: d.tiktoken: a folder or device",
        ("c.yaml", "tokenizer_encoding=d.tiktoken"),
        damage=lambda folder: (folder / "d.tiktoken").symlink_to("/dev/zero"),
    ),
    Case(
        "vocabulary too large",
        CONFIG_ERROR,
        "tokenizer_encoding: d.tiktoken: more than 67,108,864 bytes",
        ("c.yaml", "tokenizer_encoding=d.tiktoken"),
        damage=sparse("d.tiktoken", 2**40),
    ),
    override("encoding unknown", "tokenizer_encoding=gtp2", expected="got 'gtp2', expected bytes"),
    override("encoding unknown", 'tokenizer_encoding=" \\u2028"', expected="tokenizer_encoding: got ' \\u2028'"),
    command_line(
        "encoding unknown", "data", "t.npz", "--tokenizer", "a\nb", expected="tokenizer_encoding: got 'a\\nb'"
    ),
]

TRAINED = [
    resume("resume changed", CONFIG_ERROR, "seed: got 7, but the run in run was started with 0", "seed=7"),
    resume("resume changed", CONFIG_ERROR, "max_lr: got 0.01, but the run in run", "max_lr=0.01"),
    resume("resume batch", CONFIG_ERROR, "global_batch_size: got 5", "global_batch_size=5"),
    resume(
        "resume with fewer steps",
        CONFIG_ERROR,
        "num_training_steps: got 3, but the run in run has made 4",
        "num_training_steps=3",
    ),
    resume("resume tokens", DATA_ERROR, "t.npz: got tokens", damage=write("t.npz", npz(train=IDS + 1, val=IDS[:50]))),
    Case(
        "checkpoint damaged",
        CHECKPOINT_ERROR,
        "run: no checkpoint is valid",
        damage=truncate("run/checkpoints/*/*.safetensors", 99),
        finished=True,
        lines=2,
    ),
    resume(
        "checkpoint missing",
        CONFIG_ERROR,
        "output_dir: run has a trained model but no checkpoint to resume from",
        damage=delete("run/checkpoints"),
    ),
    Case("from not a run", 4, "nowhere holds no trained model", ("c.yaml", "--from", "nowhere")),
    Case("from not a run", 4, "c.yaml holds no trained model", ("c.yaml", "--from", "c.yaml")),
    Case(
        "from unfinished",
        CHECKPOINT_ERROR,
        "run holds an unfinished run",
        ("c.yaml", "output_dir=new", "--from", "run"),
        damage=delete("run/model.safetensors"),
        finished=True,
    ),
    Case(
        "from another tokenizer",
        CONFIG_ERROR,
        "tokenizer_encoding: got the tokenizer",
        ("c.yaml", "output_dir=new", "tokenizer_encoding=gpt2", "--from", "run"),
        finished=True,
    ),
    Case(
        "from a damaged tokenizer",
        CHECKPOINT_ERROR,
        "run/tokenizer: no readable tokenizer",
        ("c.yaml", "output_dir=new", "--from", "run"),
        damage=truncate("run/tokenizer/*", 9),
        finished=True,
    ),
    Case("not a run", 4, "nowhere holds no trained model", ("nowhere",), "evaluate"),
    Case("not a run", 4, "c.yaml holds no trained model", ("c.yaml", "--prompt", "x"), "generate"),
    Case("not a run", 4, ". holds no trained model", (".", "--prompt", "x"), "generate"),
    trained_run("run unfinished", "run holds an unfinished run", delete("run/model.safetensors")),
    trained_run("run's config", "run/config.yaml: cannot read the config", delete("run/config.yaml")),
    trained_run("run's config", "run/config.yaml: got no `key: value` lines", write("run/config.yaml", ""), "generate"),
    trained_run("weights unreadable", "run/model.safetensors: does not load", truncate("run/model.safetensors", 0)),
    trained_run("weights unreadable", "run/model.safetensors: does not load", truncate("run/model.safetensors", 2000)),
    trained_run(
        "weights unreadable", "run/model.safetensors: does not load", write("run/model.safetensors", b"\xff" * 99)
    ),
    trained_run(
        "weights of another model", "expected no such tensor", edit_weights(lambda t: t.update(extra=torch.ones(2)))
    ),
    trained_run("weights of another model", ": absent, expected (", edit_weights(lambda t: t.pop(sorted(t)[0]))),
    trained_run(
        "weights of another model", "expected (", edit_weights(lambda t: t.update({sorted(t)[0]: torch.ones(3)}))
    ),
    trained_run(
        "weights not finite",
        "holds NaN or infinity",
        edit_weights(lambda t: t[sorted(t)[0]].flatten()[1].fill_(torch.nan)),
    ),
    trained_run(
        "weights not finite",
        "holds NaN or infinity",
        edit_weights(lambda t: t[sorted(t)[-1]].flatten()[-1].fill_(torch.inf)),
        "generate",
    ),
    trained_run("saved tokenizer unreadable", "no readable tokenizer", delete("run/tokenizer")),
    trained_run(
        "saved tokenizer unreadable", "no readable tokenizer", write("run/tokenizer/tokenizer.json", "[" * 99_999)
    ),
    trained_run("saved tokenizer unreadable", "no readable tokenizer", write("run/tokenizer/tokenizer.json", b"\xff")),
    trained_run("saved tokenizer incomplete", "no readable tokenizer", write("run/tokenizer/tokenizer.json", "{}")),
    trained_run("saved tokenizer incomplete", "no readable tokenizer", edit_tokenizer(special_tokens=[1]), "generate"),
    trained_run("saved tokenizer incomplete", "no readable tokenizer", write("run/tokenizer/tokenizer.json", "[]")),
    trained_run("saved pattern", "no readable tokenizer", edit_tokenizer(pattern="(")),
    trained_run("saved pattern", "no readable tokenizer", edit_tokenizer(pattern=5)),
    trained_run("saved pattern", "no readable tokenizer", edit_tokenizer(pattern="\ud800")),
    trained_run(
        "saved special tokens", "expected texts with ids", edit_tokenizer(special_tokens={"<|endoftext|>": "x"})
    ),
    trained_run(
        "saved end of text", "expected <|endoftext|> among them", edit_tokenizer(special_tokens={"<eot>": 256})
    ),
    trained_run(
        "saved ids shared", "two tokens with id 8", write("run/tokenizer/ranks.tiktoken", vocabulary_lines(b7=8))
    ),
    trained_run("saved ids shared", "two tokens with id 5", edit_tokenizer(special_tokens={"<|endoftext|>": 5})),
    trained_run(
        "saved ids range", "ids from -1 to 256", write("run/tokenizer/ranks.tiktoken", vocabulary_lines(b7=-1))
    ),
    trained_run(
        "saved ids range", "to 1099511627776, expected", edit_tokenizer(special_tokens={"<|endoftext|>": 2**40})
    ),
    trained_run(
        "saved bytes", "no token for byte 255", write("run/tokenizer/ranks.tiktoken", vocabulary_lines(255)), "generate"
    ),
    trained_run(
        "saved vocabulary lines", "line 256: got", write("run/tokenizer/ranks.tiktoken", vocabulary_lines()[:-4])
    ),
]

GENERATION = [
    generate("prompt missing", 2, "one of the arguments --prompt --prefixes is required"),
    generate("prompt twice", 2, "--prefixes: not allowed with argument --prompt", "--prompt", "x", "--prefixes", "p"),
    generate("prompt too long", 2, "has 17 tokens, expected at most 15", "--prompt", "x" * 17),
    generate("prompt too long", 2, "prompt 'a\\nb", "--prompt", "a\nb" * 20),
    generate("prompt too long", 2, "has 16 tokens", "--prefixes", "p", p=json.dumps({"prefix": "x" * 16})),
    generate("new tokens range", 2, "--max-new-tokens: got 0", "--prompt", "x", "--max-new-tokens", "0"),
    generate("temperature range", 2, "--temperature: got -0.1", "--prompt", "x", "--temperature", "-0.1"),
    generate("temperature range", 2, "--temperature: got nan", "--prompt", "x", "--temperature", "nan"),
    generate("temperature range", 2, "--temperature: got inf", "--prompt", "x", "--temperature", "inf"),
    generate("top-k range", 2, "--top-k: got 0", "--prompt", "x", "--top-k", "0"),
    generate("seed range", 2, "--seed: got -1", "--prompt", "x", "--seed", "-1"),
    generate("batch range", 2, "--batch-size: got 0", "--prompt", "x", "--batch-size", "0"),
    generate("output a folder", 2, "--output: got run, a folder", "--prefixes", "p", "--output", "run", p="x"),
    generate("output nowhere", 2, "but no is not a folder", "--prefixes", "p", "--output", "no/g.jsonl", p="x"),
    generate("output nowhere", 2, "but c.yaml is not a folder", "--prefixes", "p", "--output", "c.yaml/g", p="x"),
    generate("output of a prompt", 2, "--output: got g with --prompt", "--prompt", "x", "--output", "g"),
]

CASES = [*FILES, *VALUES, *TOGETHER, *COMMAND_LINES, *MACHINE, *DATA, *TOKENIZERS, *TRAINED, *GENERATION]

AS_A_PROCESS = [
    # (rule, the command to run)
    ("yaml tag", "train"),
    ("key without suggestion", "check"),
    ("option unknown", "train"),
    ("output_dir a file", "train"),
    ("tokens unreadable", "train"),
    ("compressed npz damaged", "check"),
    ("from not a run", "check"),
    ("saved ids shared", "evaluate"),
    ("prefixes form", "generate"),
    ("memory range", "config"),
]


def test_the_table_has_many_rules_and_at_most_three_cases_of_each() -> None:
    assert len(CASES) >= 160
    ((rule, count),) = Counter(case.rule for case in CASES).most_common(1)
    assert count <= 3, rule
    assert {case.code for case in CASES} == {2, 3, 4, 6}
    assert {case.command for case in CASES} == {"check", "config", "data", "evaluate", "generate"}


def test_the_table_has_every_key() -> None:
    all_cases = " ".join(" ".join(case.arguments) + " " + case.expected for case in CASES)
    for key, _ in walk_keys():
        assert join_key(key) in all_cases, join_key(key)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the valid config."""
    folder = tmp_path_factory.mktemp("finished")
    write_valid_files(folder)
    with contextlib.chdir(folder):
        train.main(["c.yaml"])
    return folder / "run"


def write_valid_files(folder: Path) -> None:
    """A valid config and tokens for it."""
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "t.npz").write_bytes(GOOD_NPZ)


def prepare(case: Case, folder: Path, finished: Path) -> None:
    """The mistake, on disk."""
    write_valid_files(folder)
    if case.finished:
        shutil.copytree(finished, folder / "run")
    for name, content in case.files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if case.damage is not None:
        case.damage(folder)


def folder_contents(folder: Path) -> dict[str, bytes | None]:
    """The content of every file below a folder, except `status.json`, which records how the last command ended."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        small = path.is_file() and path.stat().st_size < 2**24
        contents[str(path.relative_to(folder))] = path.read_bytes() if small else None
    contents.pop("run/status.json", None)
    if not any((folder / "t.npz.unpacked").glob("*")):  # created before a compressed file is read
        contents.pop("t.npz.unpacked", None)
    return contents


def run_in_process(name: str, arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, output and error output of a command that runs in this process."""
    main = import_command(name)
    buffers = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(buffer, encoding="ascii", write_through=True) for buffer in buffers]
    argv = sys.argv
    try:
        sys.argv = [name, *arguments]
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            code = run_command(main)
    finally:
        sys.argv = argv
    output, error = (buffer.getvalue().decode() for buffer in buffers)
    return code, output, error


def formatting_problem(error: str) -> str | None:
    """What is wrong with an error's text; None if each line is complete, printable, and says what to do."""
    lines = error.split("\n")
    if lines.pop() != "":
        return "the last line does not end"
    for line in lines:
        if not line.startswith("distgpt: error: "):
            return f"not an error line: {line!r}"
        if not line.isprintable() or len(line) > 6000:
            return f"not readable: {line!r}"
        if not re.search("; |expected|: (give|run) ", line):
            return f"says neither what is expected nor what to do: {line!r}"
    return "no line" if not lines else None if len(set(lines)) == len(lines) else f"a line twice: {lines}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_refused_in_one_line_and_nothing_is_written(
    case: Case, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(case, tmp_path, finished)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # which joining a process group would set
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, setting in case.variables.items():
        monkeypatch.setenv(name, setting)
        monkeypatch.delenv(name.lower(), raising=False)
    before = folder_contents(tmp_path)
    code, output, error = run_in_process(case.command, case.arguments)
    assert formatting_problem(error) is None, error
    assert case.expected in error
    assert (code, error.count("\n")) == (case.code, case.lines), error
    assert "written" not in output and ": OK;" not in output
    assert folder_contents(tmp_path) == before


@pytest.mark.parametrize(("rule", "name"), AS_A_PROCESS)
def test_a_separate_process_reports_the_same(rule: str, name: str, tmp_path: Path, finished: Path) -> None:
    case = next(case for case in CASES if case.rule == rule)
    prepare(case, tmp_path, finished)
    before = folder_contents(tmp_path)
    done = run_process(command(name, case.arguments), tmp_path)
    assert folder_contents(tmp_path) == before
    with contextlib.chdir(tmp_path):
        code, _, error = run_in_process(case.command, case.arguments)
    assert (done.returncode, done.stderr, done.stdout) == (code, error, "")


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (("c.yaml",), {"RANK": "0"}, "environment: got RANK without WORLD_SIZE"),
        (("c.yaml", "device=cuda:9999"), {}, "device: got cuda:9999, but this"),
        (("c.yaml", "device=cuda"), {"CUDA_VISIBLE_DEVICES": ""}, "device: got cuda, but this torch"),
    ],
)
def test_training_refuses_a_wrong_environment(
    arguments: tuple[str, ...], variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    write_valid_files(tmp_path)
    before = folder_contents(tmp_path)
    done = run_process(command("train", arguments), tmp_path, **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ENVIRONMENT_ERROR, "", 1), done.stderr
    assert done.stderr.startswith(f"distgpt: error: {expected}")
    assert folder_contents(tmp_path) == before


@pytest.mark.skipif(not (REPO / ".venv" / "installed-for-dev").exists(), reason="no .venv: start with ./launch/test.sh")
@pytest.mark.parametrize("ranks", ["0", "-1", "1.5"])
def test_the_launcher_refuses_a_wrong_number_of_ranks(ranks: str, tmp_path: Path) -> None:
    write_valid_files(tmp_path)
    before = folder_contents(tmp_path)
    done = run_process([str(REPO / "launch" / "run.sh"), "c.yaml"], tmp_path, NPROC=ranks)
    assert (done.returncode, done.stdout) == (ENVIRONMENT_ERROR, ""), done.stderr
    *setup_lines, last_line = done.stderr.splitlines()  # the first start installs what is missing, and says so
    assert last_line.startswith(f"distgpt: error: NPROC: got '{ranks}', expected a whole number from 1; ")
    assert not any(line.startswith("distgpt: error") for line in setup_lines)
    assert folder_contents(tmp_path) == before


def run_process(arguments: Sequence[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a separate process."""
    return subprocess.run(
        arguments,
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=100,
        check=False,
    )


# Fuzzing

TINY = (REPO / "configs" / "GPT-tiny.yaml").read_text()
KEYS = [join_key(key) for key, _ in walk_keys()]
UNUSUAL_VALUES = [
    *("", "0", "-1", "1", "2", "3", "1e-4", "1e400", "-1e400", "9" * 39, "9" * 41, "-" + "9" * 5000, "1" + "0" * 18),
    *("0x1F", "0o17", "017", "1_000", "1:30", ".5", "5.", ".", "-", "+", "NaN", ".nan", ".inf", "-.Inf", "1e", "e5"),
    *("true", "True", "TRUE", "yes", "No", "on", "OFF", "y", "null", "Null", "~", "none", "auto", "bytes", "cuda:9"),
    *("!!str 5", "!!int '5'", "! 5", "!x y", "&a 5", "*a", "<<", "=", "?", ": :", "a: b", "- a", "--- a", "...", "%a"),
    *(
        "'",
        '"',
        "'a",
        '"a\\',
        '"\\ud800"',
        '"\\UFFFFFFFF"',
        '"\\x00"',
        '"a\\nb"',
        '"\\u2028"',
        "|",
        ">-",
        "@",
        "`",
        "#",
    ),
    *("[", "]", "{", "}", "[1, 2]", "{a: 1}", "{a: {b: {c: {d: 1}}}}", "[[[[[[[[[[[1]]]]]]]]]]]", "{1: 2, 1: 3}"),
    *("2001-01-01", "2001-01-01 00:00:00", "../..", "/", "/proc/x", "/dev/null", ".", "a/b", "x" * 5000, "\u00e9"),
]


def random_text(rng: random.Random) -> str:
    """Characters from all of Unicode."""
    planes = [(0, 32), (32, 127), (32, 127), (127, 256), (0x2000, 0x2070), (0xD800, 0xE000), (0xFE00, 0x11000)]
    return "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(1, 9)))


def random_value(rng: random.Random) -> str:
    """A value that a config might contain by mistake or by malice."""
    if rng.random() < 0.15:
        return random_text(rng)
    text = rng.choice(UNUSUAL_VALUES)
    for _ in range(rng.randrange(10) if rng.random() < 0.1 else 0):
        text = rng.choice([f"[{text}]", f"{{a: {text}}}", f"{{{text}: a}}", f"[{text}, {text}]"])
    return text


def mutate_line(rng: random.Random, lines: list[str]) -> None:
    """Change one line, or the order of two."""
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    key, colon, rest = lines[i].partition(":")
    other_key, _, other = lines[j].partition(":")
    match rng.randrange(9):
        case 0:
            del lines[i]
        case 1:
            lines.insert(j, lines[i])
        case 2:
            lines[i], lines[j] = lines[j], lines[i]
        case 3:
            lines[i], lines[j] = f"{key}:{other}", f"{other_key}:{rest}"
        case 4 | 5:
            lines[i] = f"{key}{colon} {random_value(rng)}"
        case 6:
            lines[i] = " " * rng.randrange(6) + lines[i].strip()
        case 7:
            lines.insert(i, f"{rng.choice([*KEYS, random_value(rng), random_text(rng)])}: {random_value(rng)}")
        case 8:
            column = rng.randrange(len(lines[i]) + 1)
            lines[i] = lines[i][:column] + random_text(rng) + lines[i][column:]


def mutation(seed: int) -> tuple[bytes, list[str]]:
    """A mutation of GPT-tiny's config, and overrides; the same for the same seed."""
    rng = random.Random(seed)
    lines = [row for row in TINY.splitlines() if not row.startswith("#")]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 8])):
        if lines:
            mutate_line(rng, lines)
    raw = bytearray("\n".join([*lines, ""]).encode("utf-8", "surrogatepass"))
    if rng.random() < 0.2:
        for _ in range(rng.randrange(1, 5)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.05:
        del raw[rng.randrange(len(raw)) :]
    overrides = []
    for _ in range(rng.choice([0, 0, 1, 2])):
        key = rng.choice(KEYS) if rng.random() < 0.8 else random_value(rng)
        overrides.append(f"{key}{'=' if rng.random() < 0.95 else ''}{random_value(rng)}".replace("\0", "0"))
    if rng.random() < 0.9:
        overrides.append("tokenizer_encoding=bytes")  # gpt2 takes a tenth of a second to load
    overrides = [one.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape") for one in overrides]
    return bytes(raw), [*overrides, "data=t.npz"]  # otherwise the sample corpus would be created


def wrong_response(seed: int) -> str | None:
    """What is wrong with how a mutated config is handled; None if it is used, or refused as it should be."""
    raw, overrides = mutation(seed)
    Path("c.yaml").write_bytes(raw)
    started_at = time.process_time()  # not wall-clock time, which depends on other processes
    try:
        code, _, error = run_in_process("check", ["c.yaml", "--", *overrides])
    except BaseException as failure:
        if isinstance(failure, KeyboardInterrupt):
            raise
        return f"{type(failure).__name__}: {failure}"
    seconds = time.process_time() - started_at
    if seconds > MAX_SECONDS:
        return f"took {seconds:.1f} s"
    if code not in (0, CONFIG_ERROR, DATA_ERROR, CHECKPOINT_ERROR, ENVIRONMENT_ERROR):
        return f"exit code {code}"
    if code != 0:
        return formatting_problem(error)
    config = load_config("c.yaml", overrides)
    Path("again.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    return None if load_config("again.yaml") == config and error == "" else f"loads to another config: {config}"


@contextlib.contextmanager
def fuzzing(folder: Path) -> Iterator[None]:
    """Work in a folder with enough tokens."""
    with contextlib.chdir(folder):
        Path("t.npz").write_bytes(npz(train=np.resize(IDS, 9000), val=IDS))
        yield


@pytest.mark.parametrize("part", range(5))
def test_any_mutated_config_is_used_or_refused_in_clear_lines(part: int, tmp_path: Path) -> None:
    with fuzzing(tmp_path):
        for seed in range(part, FUZZ_CASES, 5):
            assert wrong_response(seed) is None, f"seed {seed}: {mutation(seed)}"
    assert sorted(path.name for path in tmp_path.iterdir()) in (["c.yaml", "t.npz"], ["again.yaml", "c.yaml", "t.npz"])


def main(cases: int = FUZZ_CASES, first: int = 0) -> int:
    """Fuzz with `cases` seeds; print those that fail, and return their number."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder, fuzzing(Path(folder)):
        for seed in range(first, first + cases):
            if problem := wrong_response(seed):
                failed += 1
                print(f"seed {seed}: {problem!a}\n  {mutation(seed)!a}"[:2000])
    print(f"{cases} configs, {failed} handled wrongly")
    return failed


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])) > 0)
