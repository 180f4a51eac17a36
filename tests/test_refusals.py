"""Whatever is wrong is refused: a clear line a mistake, the exit code of its kind, and nothing written.

A table of mistakes, each given to the real command in this process (a sample also from the front door), and a fuzzer.
`python -m tests.test_refusals 20000 [SEED]` fuzzes for longer and shows each config that was not refused as it should.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
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

from distgpt import config as configs
from distgpt import train
from distgpt.errors import run_command
from distgpt.source import MOST_PROBLEMS, dotted
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
MOST_SECONDS = 2.0
"""Of processor time that a command may take to refuse a config."""

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")

Damage = Callable[[Path], object]
"""What happens to a case's folder."""

CONFIG_ERROR, DATA_ERROR, TRAINED_ERROR, MACHINE_ERROR = 2, 3, 4, 6


@dataclass(frozen=True)
class Case:
    """A mistake, made in a folder that holds a sound `c.yaml` and `t.npz`."""

    rule: str
    """The check that finds it; no rule has more than three cases."""
    code: int
    expected: str
    """What a line of the error contains: the place and what was found."""
    arguments: Sequence[str] = ("c.yaml",)
    command: str = "check"
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    damage: Damage | None = None
    """What else happens to the folder."""
    finished: bool = False
    """Whether `run` is a finished run of `c.yaml`."""
    variables: Mapping[str, str] = field(default_factory=dict)
    lines: int = 1

    @property
    def name(self) -> str:
        """For pytest."""
        return f"{self.rule}: {self.expected}".encode("ascii", "backslashreplace").decode()[:100]


# Making cases


def text(rule: str, content: str | bytes, expected: str) -> Case:
    """A whole config."""
    return Case(rule, CONFIG_ERROR, expected, files={"c.yaml": content})


def added(rule: str, line: str, expected: str, lines: int = 1) -> Case:
    """The sound config with something after its last line."""
    return Case(rule, CONFIG_ERROR, expected, files={"c.yaml": CONFIG + line + "\n"}, lines=lines)


def value(rule: str, key: str, written: str, expected: str) -> Case:
    """One value of the config, in the file where it has the key, else on the command line."""
    pattern = rf"(?m)^( *{key.rpartition('.')[2]}:).*"
    if "\n" in written or not re.search(pattern, CONFIG):
        return override(rule, f"{key}={written}", expected=f"command line: {key}: {expected}")
    content = re.sub(pattern, lambda found: f"{found[1]} {written}", CONFIG, count=1)
    number = content[: content.index(f"{key.rpartition('.')[2]}: {written}")].count("\n") + 1
    return Case(rule, CONFIG_ERROR, f"c.yaml:{number}: {key}: {expected}", files={"c.yaml": content})


def number(written: str) -> float | int:
    """What a config reads."""
    return int(written) if re.fullmatch("-?[0-9]+", written) else float(written)


def override(rule: str, *overrides: str, expected: str, lines: int = 1) -> Case:
    """Arguments after the sound config."""
    return Case(rule, CONFIG_ERROR, expected, ("c.yaml", *overrides), lines=lines)


def line(rule: str, name: str, *arguments: str, expected: str) -> Case:
    """A command line."""
    return Case(rule, CONFIG_ERROR, expected, arguments, name)


def npz(save: Callable[..., None] = np.savez, /, **arrays: object) -> bytes:
    """A token file; without arrays, one with none."""
    buffer = io.BytesIO()
    save(buffer, **{name: np.asarray(array) for name, array in arrays.items()})
    return buffer.getvalue()


def npy(array: object) -> bytes:
    """A file of a single array."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), allow_pickle=True)
    return buffer.getvalue()


def zipped(content: bytes) -> bytes:
    """A .npz whose `train` has this content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("train.npy", content)
        archive.writestr("val.npy", npy(IDS))
    return buffer.getvalue()


def bomb() -> bytes:
    """A compressed .npz that says it holds a petabyte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.npy", npy(IDS))
        archive.filelist[0].file_size = 2**50
    return buffer.getvalue()


def with_id(where: int, token: int) -> bytes:
    """Tokens of which one is wrong."""
    ids = IDS.astype(np.int64)
    ids[where] = token
    return npz(train=ids, val=IDS[:50])


def flipped(raw: bytes, where: int) -> bytes:
    """The same with other bits in one byte."""
    return raw[:where] + bytes([raw[where] ^ 1]) + raw[where + 1 :]


def said_to_be(raw: bytes, offset: int, size: int, number: int) -> bytes:
    """The .npz with a number in the first entry of its directory replaced."""
    at = raw.index(b"PK\x01\x02") + offset
    return raw[:at] + number.to_bytes(size, "little") + raw[at + size :]


def tokens(rule: str, content: bytes, expected: str) -> Case:
    """The token file of a run."""
    return Case(rule, DATA_ERROR, f"t.npz: {expected}", files={"t.npz": content})


def shown(rule: str, content: bytes, expected: str) -> Case:
    """A token file that `data` looks at."""
    return Case(rule, DATA_ERROR, f"t.npy: {expected}", ("t.npy", "--tokenizer", "bytes"), "data", {"t.npy": content})


def ranks(rule: str, content: str, expected: str) -> Case:
    """A rank file."""
    arguments = ("c.yaml", "tokenizer_encoding=mine.tiktoken")
    return Case(rule, CONFIG_ERROR, f"tokenizer_encoding: {expected}", arguments, files={"mine.tiktoken": content})


def scored(rule: str, content: bytes, expected: str) -> Case:
    """A file that `evaluate` is to score."""
    return Case(rule, DATA_ERROR, expected, ("run", "--data", "x"), "evaluate", {"x": content}, finished=True)


def resumed(rule: str, code: int, expected: str, *overrides: str, damage: Damage | None = None) -> Case:
    """A run that is to go on."""
    return Case(rule, code, expected, ("c.yaml", *overrides), damage=damage, finished=True)


def trained(rule: str, expected: str, damage: Damage, name: str = "evaluate") -> Case:
    """A finished run in which something was damaged."""
    arguments = ("run", "--prompt", "x") if name == "generate" else ("run",)
    return Case(rule, TRAINED_ERROR, expected, arguments, name, damage=damage, finished=True)


def generation(rule: str, code: int, expected: str, *arguments: str, **files: str | bytes) -> Case:
    """`generate` with a sound run."""
    return Case(rule, code, expected, ("run", *arguments), "generate", files, finished=True)


def placed(expected: str, **variables: str) -> Case:
    """A command that looks who it is, in an environment that does not tell."""
    rule = f"environment {expected}"
    return Case(rule, MACHINE_ERROR, expected, ("run",), "evaluate", finished=True, variables=variables)


def written(path: str, content: str | bytes) -> Damage:
    """Puts another content in a file."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / path).write_bytes(raw)


def removed(path: str) -> Damage:
    """Deletes a file or folder."""

    def remove(folder: Path) -> None:
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return remove


def sparse(path: str, size: int) -> Damage:
    """Makes a file of zeros that takes no room."""

    def grow(folder: Path) -> None:
        (folder / path).touch()
        os.truncate(folder / path, size)

    return grow


def cut(path: str, keep: int) -> Damage:
    """Ends every file that fits a pattern early."""

    def shorten(folder: Path) -> None:
        for file in sorted(folder.glob(path)):
            file.write_bytes(file.read_bytes()[:keep])

    return shorten


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Changes tensors of the trained model."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "run" / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "run" / "model.safetensors")

    return rewrite


def details(**changes: object) -> Damage:
    """Changes entries of the trained model's tokenizer."""

    def rewrite(folder: Path) -> None:
        path = folder / "run" / "tokenizer" / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return rewrite


def rank_lines(count: int = 256, **changes: int) -> str:
    """A rank file of the first bytes, where `b7=9` gives byte 7 the rank 9."""
    given = {value: changes.get(f"b{value}", value) for value in range(count)}
    return "".join(f"{base64.b64encode(bytes([value])).decode()} {rank}\n" for value, rank in given.items())


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("canary",)


# The table

FILES = [
    line("config unreadable", "check", "nowhere.yaml", expected="nowhere.yaml: cannot read the config: No such file"),
    line("config unreadable", "config", ".", expected=".: cannot read the config: Is a directory"),
    line("config unreadable", "check", "c.yaml/x", expected="c.yaml/x: cannot read the config: Not a directory"),
    text("config too large", "#" * 70_000, "c.yaml: larger than 65,536 bytes"),
    line("config too large", "config", "/dev/zero", expected="/dev/zero: larger than 65,536 bytes"),
    text("config not UTF-8", b"\xff\xfe\x00b", "c.yaml: not UTF-8 text (byte 0)"),
    text("config not UTF-8", b"output_dir: a\xe9\n", "c.yaml: not UTF-8 text (byte 13)"),
    text("config not UTF-8", CONFIG.encode() + b"# \xe2\x98", "c.yaml: not UTF-8 text"),
    text("config not keys", b"", "c.yaml: got no `key: value` lines"),
    text("config not keys", b"- output_dir: a\n", "c.yaml: got no `key: value` lines"),
    line("config not keys", "check", "/dev/null", expected="/dev/null: got no `key: value` lines"),
    text("yaml syntax", "a: [1\nb: 2", "c.yaml:2: not valid YAML"),
    text("yaml syntax", "a: 1\n\tb: 2", "c.yaml:2: not valid YAML: found character '\\t'"),
    text("yaml syntax", "a: 1\nb: 'x\n", "c.yaml:3: not valid YAML: found unexpected end of stream"),
    text("yaml documents", CONFIG + "---\na: 1\n", "not valid YAML: but found another document"),
    text("yaml character", b"a: 1\noutput_dir: a\x00b\n", "c.yaml:2: not valid YAML: got the character '\\x00'"),
    text("yaml character", b"a: \x1b[31m\n", "c.yaml:1: not valid YAML: got the character '\\x1b'"),
    override("yaml character", "output_dir=a\x07b", expected="command line: output_dir: not valid YAML: got the"),
    text("yaml escape", 'output_dir: "\\UFFFFFFFF"\n', "c.yaml: not valid YAML"),
    text("yaml escape", "%YAML 1." + "9" * 5000 + "\n---\na: 1\n", "c.yaml: not valid YAML"),
    text("yaml alias", "a: &x 1\nb: *x\n", "c.yaml:2: got an alias (*)"),
    text("yaml alias", "a: &x {b: 1}\nc:\n  <<: *x\n", "c.yaml:3: got an alias (*)"),
    text("yaml alias", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "c.yaml:2: got an alias (*)"),
    text("yaml tag", "a: 1\nbatch_size: !!int '4'\n", "c.yaml:2: got the tag '!!int'"),
    text("yaml tag", "x: !!python/object/apply:os.mkdir [canary]\n", "c.yaml:1: got the tag '!!python/object/apply:os"),
    text("yaml tag", "!!str output_dir: run\n", "c.yaml:1: got the tag '!!str'"),
    override("yaml tag on the command line", "seed=!!str 5", expected="command line: seed: got the tag '!!str'"),
    override("yaml tag on the command line", "seed=! 5", expected="command line: seed: got the tag '!'"),
    text("yaml depth", "a: " + "[" * 5000, "c.yaml:1: nested too deeply"),
    text("yaml depth", "".join("  " * i + "a:\n" for i in range(12)), "nested too deeply"),
    override(
        "yaml depth", "a={b: {c: {d: {e: {f: {g: {h: {i: {}}}}}}}}}", expected="command line: a: nested too deeply"
    ),
    added("key twice", "max_lr: 1e-3", "max_lr: given twice (first at c.yaml:16)"),
    added("key twice", "optimizer: {beta1: 0.5, beta1: 0.6}", "optimizer.beta1: given twice (first at c.yaml:20)"),
    added("key twice", "seed: 1\nseed: 2\nseed: 3", "c.yaml:21: seed: given twice"),
    added("key unknown", "bathc_size: 4", "c.yaml:20: bathc_size: unknown key; did you mean batch_size?"),
    added("key unknown", "eval: {evry: 4}", "eval.evry: unknown key; did you mean eval.every?"),
    override("key unknown", "n_layers=4", expected="n_layers: unknown key; did you mean model_config.n_layer?"),
    added("key unheard of", '"a\\nb": 1', "c.yaml:20: a\\nb: unknown key; `python -m distgpt.train --help`"),
    added("key unheard of", "? [1, 2]\n: 3", "?: unknown key"),
    added("key unheard of", "k" * 900 + ": 1", "kkk...: unknown key"),
    added("key with a dot", "optimizer.beta1: 0.5", "optimizer.beta1: unknown key; dots lead into sections on the"),
    added("key with a dot", "'eval.every': 5", "indent every below eval"),
    text("key missing", CONFIG.replace("output_dir: run\n", ""), "c.yaml: output_dir: missing; add it"),
    text("key missing", CONFIG.replace("  n_layer: 1\n", ""), "model_config.n_layer: missing; add it"),
    override("key missing", "model_config={n_head: 2, n_positions: 16, n_layer: 1}", expected="n_embd: missing; add"),
    Case("all at once", CONFIG_ERROR, "c.yaml: seq_len: missing", files={"c.yaml": "{}"}, lines=8),
    override("all at once", "batch_size=0", "seed=x", "max_lr=fast", "sede=1", expected="sede: unknown key", lines=4),
    override("all at once", "seq_len=17", "min_lr=1", expected="min_lr: got 1, expected at most max_lr", lines=2),
    added(
        "no more than can be read",
        "".join(f"key{i}: 1\n" for i in range(3000)),
        "c.yaml: and 2,980 more problems, left out here; mend these first",
        lines=MOST_PROBLEMS + 1,
    ),
    line("path on one line", "check", "a\nb.yaml", expected="argument CONFIG: got 'a\\nb.yaml', expected a path"),
    line("path on one line", "data", "", expected="argument PATH: got '', expected a path"),
    line("path on one line", "evaluate", "run\n", expected="argument RUN: got 'run\\n'"),
]

INTEGERS = {
    # key: (wrong type, too small, too large), the first of them YAML's traps
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
    "seed": ("2001-01-01", "-1", "9223372036854775808"),
    "log_every": ("1,000", "0", "1" + "0" * 30),
    "eval.every": ("[5]", "0", "1000000001"),
    "eval.max_tokens": ("{a: 1}", "0", "1000000000001"),
    "checkpoint.every": ("never", "0", "1000000001"),
    "checkpoint.keep": ("~", "0", "1000001"),
    "parallel.shard_ranks": ("0b11", "0", "1048577"),
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
    "max_minutes": ("1:30", "0", "1e7"),
    "hang_minutes": ("null", "-15", "1e7"),
}
OUT_OF_ANY_RANGE = {"integer": ("x", "-1", "1" + "0" * 30), "number": ("x", "-1", "1e300")}
VALUES = [
    value(f"{dotted(key)}: {part}", dotted(key), wrong, f"got {number(wrong)}, expected {part}" if part else "got ")
    for key, info in configs.walk_keys()
    if info.kind in OUT_OF_ANY_RANGE
    for part, wrong in zip(
        ("", "greater than", "less than"),
        (INTEGERS | NUMBERS).get(dotted(key), OUT_OF_ANY_RANGE[info.kind]),
        strict=True,
    )
]
VALUES += [
    value("not finite", "max_lr", "1e999", "got inf, expected a finite number"),
    value("not finite", "optimizer.grad_clip", "9e9999", "got inf, expected a finite number"),
    value("not finite", "hang_minutes", "-1e999", "got -inf, expected a finite number"),
    value("mask_documents type", "mask_documents", "yes", "got 'yes' (text), expected true or false"),
    value("mask_documents type", "mask_documents", "1", "got 1, expected true or false"),
    value("mask_documents type", "mask_documents", "TRUE", "got 'TRUE' (text), expected true or false"),
    value("reshard type", "parallel.reshard_after_forward", "0.0", "got 0.0, expected true or false"),
    value("precision choice", "precision", "fp16", "got 'fp16' (text), expected auto, bf16, tf32 or fp32"),
    value("precision choice", "precision", "[fp32]", "got ['fp32'], expected auto, bf16"),
    value("compile choice", "compile", "true", "got true, expected auto, on or off"),
    value("compile choice", "compile", "'on '", "got 'on ' (text), expected auto, on or off"),
    value("checkpointing choice", "activation_checkpointing", "null", "got nothing (null), expected none, full"),
    value(
        "strategy choice", "parallel.strategy", "zero3", "got 'zero3' (text), expected auto, none, ddp, fsdp or hsdp"
    ),
    value("strategy choice", "parallel.strategy", "FSDP", "got 'FSDP' (text), expected auto"),
    value("gradients choice", "parallel.reduce_gradients", "never", "got 'never' (text), expected auto, each or last"),
    value("exchange choice", "parallel.reduce_dtype", "fp16", "got 'fp16' (text), expected fp32 or bf16"),
    value("wandb choice", "wandb", "no", "got 'no' (text), expected auto, online, offline or disabled"),
    value("output_dir text", "output_dir", "5", "got 5, expected a valid string"),
    value("output_dir text", "output_dir", "''", "got '' (text), expected"),
    value("output_dir text", "output_dir", '"\\ud800"', "got '\\ud800' (text), expected"),
    value("output_dir length", "output_dir", "x" * 5000, "got 'xxxx"),
    value("data text", "data", "[a, b]", "got ['a', 'b'], expected a valid string"),
    value("data text", "data", "1e3", "got 1000.0, expected a valid string"),
    value("tokenizer text", "tokenizer_encoding", "null", "got nothing (null), expected a valid string"),
    value("unquoted yes", "output_dir", "yes", "got an unquoted yes, no, on or off"),
    value("unquoted yes", "tokenizer_encoding", "Off", "got an unquoted yes, no, on or off"),
    override("unquoted yes", "data=n", expected="command line: data: got an unquoted yes"),
    value("device name", "device", "gpu", "got 'gpu' (text), expected auto, cpu, cuda, cuda:N or mps"),
    value("device name", "device", "cuda:-1", "got 'cuda:-1' (text), expected auto"),
    value("device name", "device", '"cpu\\n"', "got 'cpu\\n' (text), expected auto"),
    override("section type", "optimizer=5", expected="optimizer: got 5, expected a section of indented keys"),
    override("section type", "eval=[1]", expected="eval: got [1], expected a section of indented keys"),
    override("section type", "checkpoint=", expected="checkpoint: got nothing (null), expected a section"),
]

VALUES += [
    value("profile.steps", "profile.steps", wrong, f"got {got}, expected two integers in brackets, such as [10, 12]")
    for wrong, got in [("10", "10"), ("[a, 2]", "'a' (text)"), ("[1, 2, 3]", "[1, 2, 3]")]
]

TOGETHER = [
    value("steps in order", "profile.steps", "[12, 10]", "got [12, 10], expected the first and the last of at most"),
    value("steps in order", "profile.steps", "[1, 101]", "got [1, 101], expected the first and the last of at most"),
    value("heads divide width", "model_config.n_head", "3", "got 3, expected a divisor of model_config.n_embd = 16"),
    override("heads divide width", "model_config.n_embd=17", expected="n_head: got 2, expected a divisor"),
    value("positions suffice", "seq_len", "17", "got 17, but the model reads at most model_config.n_positions = 16"),
    value("warm-up ends", "num_warmup_steps", "5", "got 5, expected at most num_training_steps = 4"),
    value("rates in order", "min_lr", "2e-3", "got 0.002, expected at most max_lr = 0.001"),
    override(
        "one global batch",
        "global_batch_size=9",
        "grad_accumulation_steps=2",
        expected="global_batch_size: got 9, but batch_size x grad_accumulation_steps = 8",
    ),
    override("shards need hsdp", "parallel.shard_ranks=2", expected="got 2 with parallel.strategy = auto"),
    override("shards need hsdp", "parallel={strategy: fsdp, shard_ranks: 2}", expected="parallel.strategy = fsdp"),
    value("control character", "output_dir", '"a\\nb"', "got the control character '\\n'"),
    value("control character", "data", '"a\\0b"', "got the control character '\\x00'"),
    value("control character", "tokenizer_encoding", '"\\e[31m"', "got the control character '\\x1b'"),
]

COMMAND_LINES = [
    override("override form", "max_lr", expected="command line: got 'max_lr', expected key=value"),
    override("override form", "=3", expected="command line: got '=3', expected key=value"),
    override("override form", "fresh", expected="options start with --, as in --fresh"),
    override("override syntax", "max_lr=[", expected="command line: max_lr: not valid YAML"),
    override("override syntax", "seed={", "log_every=0", expected="command line: seed: not valid YAML", lines=2),
    override("override syntax", "data=@x", expected="command line: data: not valid YAML: found character '@'"),
    override("override of a value's key", "max_lr.x=1", expected="max_lr.x: max_lr is a single value and has no keys"),
    override("override of a value's key", "data.a.b=1", expected="data.a.b: data is a single value"),
    override("override depth", "a" + ".b" * 9 + "=1", expected="expected at most 8 names"),
    override("override of nothing", "sched.every=1", expected="command line: sched: unknown key"),
    override("override of nothing", "a\nb=1", expected="command line: a\\nb: unknown key"),
    override("override of nothing", "eval..every=1", expected="command line: eval.: unknown key"),
    line("option unknown", "check", "c.yaml", "--bogus", expected="command line: unrecognized arguments: --bogus"),
    line("option unknown", "data", "t.npz", "a\nb", expected="command line: unrecognized arguments: a\\nb"),
    line("option unknown", "generate", "run", "--prompt", "x", "-k", expected="unrecognized arguments: -k"),
    line("argument missing", "check", expected="the following arguments are required: CONFIG"),
    line("argument missing", "evaluate", expected="the following arguments are required: RUN"),
    line("argument missing", "data", "--seq-len", "5", expected="the following arguments are required: PATH"),
    line("option without value", "check", "c.yaml", "--from", expected="argument --from: expected one argument"),
    line("option without value", "evaluate", "run", "--data", expected="argument --data: expected one argument"),
    line("option with value", "check", "c.yaml", "--fresh=1", expected="argument --fresh: ignored explicit argument"),
    line("option ambiguous", "check", "c.yaml", "--fr", expected="ambiguous option: --fr could match --fresh, --from"),
    line("option no integer", "config", "c.yaml", "--ranks", "3.5", expected="--ranks: invalid int value: '3.5'"),
    line("option no integer", "data", "t.npz", "--seq-len", "x\ny", expected="--seq-len: invalid int value: 'x\\ny'"),
    line("option no integer", "generate", "run", "--prompt", "x", "--seed", "9" * 5000, expected="--seed: invalid int"),
    line("option no number", "config", "c.yaml", "--gpu-memory", "80GB", expected="invalid float value: '80GB'"),
    line("ranks range", "config", "c.yaml", "--ranks", "0", expected="--ranks: got 0, expected a number from 1"),
    line("ranks range", "config", "c.yaml", "--plan", "--ranks", "1048577", expected="--ranks: got 1048577"),
    line(
        "memory range", "config", "c.yaml", "--gpu-memory", "0", expected="--gpu-memory: got 0.0, expected GB above 0"
    ),
    line("memory range", "config", "c.yaml", "--plan", "--gpu-memory", "nan", expected="--gpu-memory: got nan"),
    line("memory range", "config", "c.yaml", "--plan", "--gpu-memory", "inf", expected="--gpu-memory: got inf"),
    line("window length", "data", "t.npz", "--seq-len", "0", expected="--seq-len: got 0, expected at least 1"),
    line(
        "plan's shards",
        *("config", "c.yaml", "parallel={strategy: hsdp, shard_ranks: 4}", "--plan", "--ranks", "6"),
        expected="parallel.shard_ranks: got 4 with 6 ranks, expected a divisor of 6",
    ),
]

MACHINE = [
    Case("output_dir a file", 6, "output_dir: c.yaml is a file, expected a folder", ("c.yaml", "output_dir=c.yaml")),
    Case("output_dir a file", 6, "c.yaml is a file, expected a folder", ("c.yaml", "output_dir=c.yaml/a/b")),
    Case("output_dir a file", 6, "output_dir: /dev/null is a file", ("c.yaml", "output_dir=/dev/null/run")),
    Case("output_dir read-only", 6, "output_dir: cannot write in /proc: ", ("c.yaml", "output_dir=/proc/run")),
    Case("output_dir read-only", 6, "output_dir: cannot write in ", ("c.yaml", f"output_dir={'x' * 300}")),
    Case(
        "tokenizer download",
        MACHINE_ERROR,
        "tokenizer_encoding: o200k_base is not on this machine and its download failed",
        ("c.yaml", "tokenizer_encoding=o200k_base"),
        variables={"TIKTOKEN_CACHE_DIR": "cache", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""},
    ),
    placed("environment: got RANK without WORLD_SIZE", RANK="0"),
    placed("environment: got WORLD_SIZE without RANK", WORLD_SIZE="2"),
    placed("environment: got LOCAL_RANK without RANK, WORLD_SIZE", LOCAL_RANK="0"),
    placed("expected whole numbers", RANK="0", WORLD_SIZE="two"),
    placed("environment: got RANK=2, expected 0 to 1", RANK="2", WORLD_SIZE="2"),
    placed("environment: got RANK=-1", RANK="-1", WORLD_SIZE="2"),
    placed("WORLD_SIZE=0", RANK="0", WORLD_SIZE="0"),
    placed("process group: could not meet the other ranks", RANK="0", WORLD_SIZE="1"),
    Case("stale rank", 2, "x: unknown key", ("c.yaml", "x=1"), variables={"LOCAL_RANK": "x"}),
    Case("stale rank", 2, "x: unknown key", ("c.yaml", "x=1"), variables={"LOCAL_RANK": "1"}),
    Case("device not there", 6, "device: got cuda:", ("run", "--device", "cuda:9999"), "evaluate", finished=True),
    generation("device not there", 6, "device: got cuda:", "--prompt", "x", "--device", "cuda:9999"),
    generation("device unknown", 2, "device: got 'tpu', expected auto", "--prompt", "x", "--device", "tpu"),
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
FLIPPED_NPZ = flipped(GOOD_NPZ, GOOD_NPZ.index(IDS.tobytes()) + 200)
PACKED_NPZ = npz(np.savez_compressed, train=IDS, val=IDS[:50])
DATA = [
    Case("tokens unreadable", 3, "nowhere.npz: cannot read: No such file", ("c.yaml", "data=nowhere.npz")),
    Case("tokens unreadable", 3, "t.npz/x: cannot read: Not a directory", ("c.yaml", "data=t.npz/x")),
    Case("tokens unreadable", 3, "xxx: cannot read: File name too long", ("c.yaml", f"data={'x' * 300}")),
    Case("tokens no file", 3, ".: got a folder or device", ("c.yaml", "data=.")),
    Case("tokens no file", 3, "/dev/zero: got a folder or device", ("/dev/zero",), "data"),
    tokens("tokens of another kind", b"", "got 0 bytes that are neither .npz nor .npy"),
    tokens("tokens of another kind", GOOD_NPZ[:1], "got 1 bytes that are neither .npz nor .npy"),
    tokens("tokens of another kind", b"<!DOCTYPE html>", "got 15 bytes that are neither"),
    tokens("npz cut short", GOOD_NPZ[:40], "damaged .npz (40 bytes: File is not a zip file)"),
    tokens("npz cut short", GOOD_NPZ[: len(GOOD_NPZ) // 2], "damaged .npz"),
    tokens("npz cut short", GOOD_NPZ[:-1], "damaged .npz"),
    tokens("npz damaged", flipped(GOOD_NPZ, GOOD_NPZ.index(b"PK\x01\x02")), "damaged .npz"),
    tokens("npz damaged", said_to_be(GOOD_NPZ, 10, 2, 99), "damaged .npz"),
    tokens("npz damaged", flipped(GOOD_NPZ, 1), "got 1,"),
    tokens("packed npz damaged", flipped(PACKED_NPZ, 200), "damaged .npz"),
    tokens("packed npz damaged", said_to_be(PACKED_NPZ, 16, 4, 7), "damaged .npz"),
    tokens("packed npz damaged", said_to_be(PACKED_NPZ, 10, 2, 99), "damaged .npz"),
    tokens("packed npz a bomb", bomb(), "train.npy is compressed and needs 1,125,899,906,842,624 bytes unpacked"),
    tokens("arrays missing", npz(train=IDS), "has arrays train, expected train and val; add val"),
    tokens("arrays missing", npz(**{"a\nb": IDS}), "has arrays a\\nb, expected train and val; add train"),
    tokens("arrays missing", npz(), "has arrays none"),
    tokens("npy for npz", npy(IDS), "has arrays tokens, expected train and val"),
    tokens("array type", npz(train=IDS / 2, val=IDS), "train is an array of float64"),
    tokens("array type", npz(train=IDS, val=IDS > 9), "val is an array of bool"),
    tokens("array type", npz(train=np.array(["a", "b"]), val=IDS), "train is an array of <U1"),
    tokens("array shape", npz(train=IDS.reshape(20, 20), val=IDS), "train is an array of uint16 with shape (20, 20)"),
    tokens("array shape", npz(train=np.uint16(5), val=IDS), "train is an array of uint16 with shape ()"),
    tokens("array of objects", npz(train=np.array([Payload()], dtype=object), val=IDS), "train holds Python objects"),
    shown("array of objects", npy(np.array([Payload()], dtype=object)), "tokens holds Python objects"),
    tokens("header", zipped(b"no header at all"), "train: no sound .npy header"),
    tokens("header", zipped(npy(IDS)[:20]), "train: no sound .npy header"),
    tokens("header", zipped(npy(IDS).replace(b"(400,)", b"(-40,)")), "train: no sound .npy header"),
    tokens("header that lies", zipped(npy(IDS).replace(b"(400,), } ", b"(4000,), }")), "train needs bytes up to 8,"),
    tokens(
        "header that lies",
        zipped(npy(IDS).replace(b"(400,), }      ", b"(400000000,), }")),
        "train needs bytes",
    ),
    shown("header that lies", npy(IDS)[:-1], "tokens needs bytes up to 928, but the file ends at 927"),
    tokens("id outside", with_id(0, 257), "train[0] is token 257, expected 0 to 256"),
    tokens("id outside", with_id(399, -1), "train[399] is token -1"),
    tokens("id outside", with_id(217, 2**40), "train[217] is token 1099511627776"),
    tokens("held-out id outside", npz(train=IDS, val=IDS + 200), "val["),
    shown("held-out id outside", npy(IDS.astype(np.uint64) - np.uint64(300)), "tokens["),
    tokens("no tokens", npz(train=IDS[:0], val=IDS), "train has 0 tokens, expected at least 2"),
    tokens("no tokens", npz(train=IDS, val=IDS[:1]), "val has 1 tokens, expected at least 2"),
    tokens("too few tokens", npz(train=IDS[:64], val=IDS), "train has 64 tokens, expected at least 65"),
    Case("too few tokens", 3, "train has 400 tokens, expected", ("c.yaml", "global_batch_size=1073741824")),
    tokens("checksum", FLIPPED_NPZ, "train has checksum"),
    Case(
        "checksum",
        3,
        "t.npz: train has checksum",
        ("t.npz",),
        "data",
        {"t.npz": FLIPPED_NPZ},
    ),
    shown("file without arrays", npz(), "holds no arrays, expected train and val"),
    scored("file without arrays", npz(), "x: holds no arrays, expected val"),
    scored("text too short", b"", "x: text has 0 tokens, expected at least 2"),
    scored("text too short", b"x", "x: text has 1 tokens, expected at least 2"),
    scored("text not UTF-8", b"abc\xff", "x: neither a token file nor UTF-8 text (byte 3)"),
    scored("scored tokens cut short", GOOD_NPZ[:-9], "x: damaged .npz"),
    scored("scored tokens damaged", flipped(GOOD_NPZ, GOOD_NPZ.rindex(IDS[:50].tobytes()) + 20), "x: val has checksum"),
    scored("scored id outside", npy(IDS + 200), "x: tokens["),
    Case("text unreadable", 3, "nowhere: cannot read", ("run", "--data", "nowhere"), "evaluate", finished=True),
    Case("text no file", 3, "run: got a folder or device", ("run", "--data", "run"), "evaluate", finished=True),
    Case(
        "text no file", 3, "/dev/zero: got a folder or dev", ("run", "--data", "/dev/zero"), "evaluate", finished=True
    ),
    Case("run's tokens gone", 3, "t.npz: cannot read", ("run",), "evaluate", damage=removed("t.npz"), finished=True),
    generation("prefixes unreadable", 3, "nowhere: cannot read", "--prefixes", "nowhere"),
    generation("prefixes unreadable", 3, "run: cannot read: Is a directory", "--prefixes", "run"),
    generation("prefixes a device", 3, "/dev/zero: got a device", "--prefixes", "/dev/zero"),
    generation("prefixes not UTF-8", 3, "p: not UTF-8 text (byte 0)", "--prefixes", "p", p=b"\xff"),
    generation("prefixes empty", 3, "p: has no lines", "--prefixes", "p", p=b"\n\n"),
    generation("prefixes form", 3, "p:2: got 'x', expected", "--prefixes", "p", p='{"prefix": "a"}\nx\n'),
    generation("prefixes form", 3, "p:1: got", "--prefixes", "p", p='{"prefix": 5}'),
    generation("prefixes form", 3, "p:1: got", "--prefixes", "p", p="[" * 100_000),
]

TOKENIZERS = [
    ranks("rank file's bytes", "", "mine.tiktoken: no token for byte 0 (and 255 others)"),
    ranks("rank file's bytes", rank_lines(255), "mine.tiktoken: no token for byte 255"),
    ranks("rank file's lines", "AA== 0\nnonsense\n", "mine.tiktoken: line 2: got b'nonsense'"),
    ranks("rank file's lines", rank_lines()[:-4], "mine.tiktoken: line 256: got b'/w== '"),
    ranks("rank file's lines", "AA== 0\n*** 1\n", "mine.tiktoken: line 2: got b'*** 1'"),
    ranks("rank file's order", rank_lines(b7=-1), "mine.tiktoken: the ranks of its 256 tokens are not 0, 1, 2"),
    ranks("rank file's order", rank_lines(b7=8), "mine.tiktoken: the ranks of its 256 tokens are not 0, 1, 2"),
    override(
        "rank file unreadable", "tokenizer_encoding=no.tiktoken", expected="cannot read no.tiktoken: No such file"
    ),
    Case(
        "rank file no file",
        CONFIG_ERROR,
        "tokenizer_encoding: d.tiktoken: a folder or device",
        ("c.yaml", "tokenizer_encoding=d.tiktoken"),
        damage=lambda folder: (folder / "d.tiktoken").mkdir(),
    ),
    Case(
        "rank file no file",
        CONFIG_ERROR,
        "tokenizer_encoding: d.tiktoken: a folder or device",
        ("c.yaml", "tokenizer_encoding=d.tiktoken"),
        damage=lambda folder: (folder / "d.tiktoken").symlink_to("/dev/zero"),
    ),
    Case(
        "rank file too large",
        CONFIG_ERROR,
        "tokenizer_encoding: d.tiktoken: larger than 67,108,864 bytes",
        ("c.yaml", "tokenizer_encoding=d.tiktoken"),
        damage=sparse("d.tiktoken", 2**40),
    ),
    override("encoding unknown", "tokenizer_encoding=gtp2", expected="got 'gtp2', expected bytes"),
    override("encoding unknown", 'tokenizer_encoding=" \\u2028"', expected="tokenizer_encoding: got ' \\u2028'"),
    line("encoding unknown", "data", "t.npz", "--tokenizer", "a\nb", expected="tokenizer_encoding: got 'a\\nb'"),
]

TRAINED = [
    resumed("resume changed", CONFIG_ERROR, "seed: got 7, but the run in run was started with 0", "seed=7"),
    resumed("resume changed", CONFIG_ERROR, "max_lr: got 0.01, but the run in run", "max_lr=0.01"),
    resumed("resume batch", CONFIG_ERROR, "global_batch_size: got 5", "global_batch_size=5"),
    resumed(
        "resume shorter",
        CONFIG_ERROR,
        "num_training_steps: got 3, but the run in run has made 4",
        "num_training_steps=3",
    ),
    resumed(
        "resume tokens", DATA_ERROR, "t.npz: got tokens", damage=written("t.npz", npz(train=IDS + 1, val=IDS[:50]))
    ),
    Case(
        "checkpoint damaged",
        TRAINED_ERROR,
        "run: no checkpoint is sound",
        damage=cut("run/checkpoints/*/*.safetensors", 99),
        finished=True,
        lines=2,
    ),
    resumed(
        "checkpoint gone", CONFIG_ERROR, "output_dir: run holds a trained model", damage=removed("run/checkpoints")
    ),
    Case("from no run", 4, "nowhere holds no trained model", ("c.yaml", "--from", "nowhere")),
    Case("from no run", 4, "c.yaml holds no trained model", ("c.yaml", "--from", "c.yaml")),
    Case(
        "from unfinished",
        TRAINED_ERROR,
        "run holds an unfinished run",
        ("c.yaml", "output_dir=new", "--from", "run"),
        damage=removed("run/model.safetensors"),
        finished=True,
    ),
    Case(
        "from another tokenizer",
        CONFIG_ERROR,
        "tokenizer_encoding: got tokens of",
        ("c.yaml", "output_dir=new", "tokenizer_encoding=gpt2", "--from", "run"),
        finished=True,
    ),
    Case(
        "from a damaged tokenizer",
        TRAINED_ERROR,
        "run/tokenizer: no readable tokenizer",
        ("c.yaml", "output_dir=new", "--from", "run"),
        damage=cut("run/tokenizer/*", 9),
        finished=True,
    ),
    Case("no run", 4, "nowhere holds no trained model", ("nowhere",), "evaluate"),
    Case("no run", 4, "c.yaml holds no trained model", ("c.yaml", "--prompt", "x"), "generate"),
    Case("no run", 4, ". holds no trained model", (".", "--prompt", "x"), "generate"),
    trained("run unfinished", "run holds an unfinished run", removed("run/model.safetensors")),
    trained("run's config", "run/config.yaml: cannot read the config", removed("run/config.yaml")),
    trained("run's config", "run/config.yaml: got no `key: value` lines", written("run/config.yaml", ""), "generate"),
    trained("weights unreadable", "run/model.safetensors: does not load", cut("run/model.safetensors", 0)),
    trained("weights unreadable", "run/model.safetensors: does not load", cut("run/model.safetensors", 2000)),
    trained(
        "weights unreadable", "run/model.safetensors: does not load", written("run/model.safetensors", b"\xff" * 99)
    ),
    trained("weights of another model", "expected no such tensor", weights(lambda t: t.update(extra=torch.ones(2)))),
    trained("weights of another model", ": absent, expected (", weights(lambda t: t.pop(sorted(t)[0]))),
    trained("weights of another model", "expected (", weights(lambda t: t.update({sorted(t)[0]: torch.ones(3)}))),
    trained(
        "weights no numbers", "holds NaN or infinity", weights(lambda t: t[sorted(t)[0]].flatten()[1].fill_(torch.nan))
    ),
    trained(
        "weights no numbers",
        "holds NaN or infinity",
        weights(lambda t: t[sorted(t)[-1]].flatten()[-1].fill_(torch.inf)),
        "generate",
    ),
    trained("saved tokenizer unreadable", "no readable tokenizer", removed("run/tokenizer")),
    trained(
        "saved tokenizer unreadable", "no readable tokenizer", written("run/tokenizer/tokenizer.json", "[" * 99_999)
    ),
    trained("saved tokenizer unreadable", "no readable tokenizer", written("run/tokenizer/tokenizer.json", b"\xff")),
    trained("saved tokenizer's parts", "no readable tokenizer", written("run/tokenizer/tokenizer.json", "{}")),
    trained("saved tokenizer's parts", "no readable tokenizer", details(special_tokens=[1]), "generate"),
    trained("saved tokenizer's parts", "no readable tokenizer", written("run/tokenizer/tokenizer.json", "[]")),
    trained("saved pattern", "no readable tokenizer", details(pattern="(")),
    trained("saved pattern", "no readable tokenizer", details(pattern=5)),
    trained("saved pattern", "no readable tokenizer", details(pattern="\ud800")),
    trained("saved special tokens", "expected texts with ids", details(special_tokens={"<|endoftext|>": "x"})),
    trained("saved end of text", "expected <|endoftext|> among them", details(special_tokens={"<eot>": 256})),
    trained("saved ids shared", "two tokens with id 8", written("run/tokenizer/ranks.tiktoken", rank_lines(b7=8))),
    trained("saved ids shared", "two tokens with id 5", details(special_tokens={"<|endoftext|>": 5})),
    trained("saved ids range", "ids from -1 to 256", written("run/tokenizer/ranks.tiktoken", rank_lines(b7=-1))),
    trained("saved ids range", "to 1099511627776, expected", details(special_tokens={"<|endoftext|>": 2**40})),
    trained(
        "saved bytes", "no token for byte 255", written("run/tokenizer/ranks.tiktoken", rank_lines(255)), "generate"
    ),
    trained("saved rank lines", "line 256: got", written("run/tokenizer/ranks.tiktoken", rank_lines()[:-4])),
]

GENERATION = [
    generation("prompt missing", 2, "one of the arguments --prompt --prefixes is required"),
    generation("prompt twice", 2, "--prefixes: not allowed with argument --prompt", "--prompt", "x", "--prefixes", "p"),
    generation("prompt too long", 2, "has 17 tokens, expected at most 15", "--prompt", "x" * 17),
    generation("prompt too long", 2, "prompt 'a\\nb", "--prompt", "a\nb" * 20),
    generation("prompt too long", 2, "has 16 tokens", "--prefixes", "p", p=json.dumps({"prefix": "x" * 16})),
    generation("new tokens range", 2, "--max-new-tokens: got 0", "--prompt", "x", "--max-new-tokens", "0"),
    generation("temperature range", 2, "--temperature: got -0.1", "--prompt", "x", "--temperature", "-0.1"),
    generation("temperature range", 2, "--temperature: got nan", "--prompt", "x", "--temperature", "nan"),
    generation("temperature range", 2, "--temperature: got inf", "--prompt", "x", "--temperature", "inf"),
    generation("top-k range", 2, "--top-k: got 0", "--prompt", "x", "--top-k", "0"),
    generation("seed range", 2, "--seed: got -1", "--prompt", "x", "--seed", "-1"),
    generation("batch range", 2, "--batch-size: got 0", "--prompt", "x", "--batch-size", "0"),
    generation("output a folder", 2, "--output: got run, a folder", "--prefixes", "p", "--output", "run", p="x"),
    generation("output nowhere", 2, "but no is no folder", "--prefixes", "p", "--output", "no/g.jsonl", p="x"),
    generation("output nowhere", 2, "but c.yaml is no folder", "--prefixes", "p", "--output", "c.yaml/g", p="x"),
    generation("output of a prompt", 2, "--output: got g with --prompt", "--prompt", "x", "--output", "g"),
]

CASES = [*FILES, *VALUES, *TOGETHER, *COMMAND_LINES, *MACHINE, *DATA, *TOKENIZERS, *TRAINED, *GENERATION]

FROM_THE_FRONT_DOOR = [
    # (rule, the command instead of the case's own)
    ("yaml tag", "train"),
    ("key unheard of", "check"),
    ("option unknown", "train"),
    ("output_dir a file", "train"),
    ("tokens unreadable", "train"),
    ("packed npz damaged", "check"),
    ("from no run", "check"),
    ("saved ids shared", "evaluate"),
    ("prefixes form", "generate"),
    ("memory range", "config"),
]


def test_the_table_is_broad_and_no_rule_is_padded() -> None:
    assert len(CASES) >= 160
    most = Counter(case.rule for case in CASES).most_common(1)
    assert most[0][1] <= 3, most
    assert {case.code for case in CASES} == {2, 3, 4, 6}
    assert {case.command for case in CASES} == {"check", "config", "data", "evaluate", "generate"}


def test_the_table_has_every_key() -> None:
    given = " ".join([*(" ".join(case.arguments) + " " + case.expected for case in CASES)])
    for key, _ in configs.walk_keys():
        assert dotted(key) in given, dotted(key)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the sound config."""
    folder = tmp_path_factory.mktemp("finished")
    fill(folder)
    with contextlib.chdir(folder):
        train.main(["c.yaml"])
    return folder / "run"


def fill(folder: Path) -> None:
    """A sound config and tokens for it."""
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "t.npz").write_bytes(GOOD_NPZ)


def make(case: Case, folder: Path, finished: Path) -> None:
    """The mistake, on disk."""
    fill(folder)
    if case.finished:
        shutil.copytree(finished, folder / "run")
    for name, content in case.files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if case.damage is not None:
        case.damage(folder)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, with contents; but for `status.json`, which tells how the last run ended."""
    found = {}
    for path in sorted(folder.rglob("*")):
        small = path.is_file() and path.stat().st_size < 2**24
        found[str(path.relative_to(folder))] = path.read_bytes() if small else None
    found.pop("run/status.json", None)
    if not any((folder / "t.npz.unpacked").glob("*")):  # made before a compressed file is looked into
        found.pop("t.npz.unpacked", None)
    return found


def in_process(name: str, arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, output and error of a command that runs here, as from its front door."""
    main = importlib.import_module(f"distgpt.{name}").main
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


def unclear(error: str) -> str | None:
    """What is wrong with an error's text; None where each line is whole, printable, and says what to do."""
    lines = error.split("\n")
    if lines.pop() != "":
        return "the last line does not end"
    for told in lines:
        if not told.startswith("distgpt: error: "):
            return f"not a line of ours: {told!r}"
        if not told.isprintable() or len(told) > 6000:
            return f"not a line to read: {told!r}"
        if not re.search("; |expected|: (give|run) ", told):
            return f"says neither what is expected nor what to do: {told!r}"
    return "no line" if not lines else None if len(set(lines)) == len(lines) else f"a line twice: {lines}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_refused_in_a_line_and_nothing_is_written(
    case: Case, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(case, tmp_path, finished)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # which meeting other ranks would set
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, setting in case.variables.items():
        monkeypatch.setenv(name, setting)
        monkeypatch.delenv(name.lower(), raising=False)
    before = listing(tmp_path)
    code, output, error = in_process(case.command, case.arguments)
    assert unclear(error) is None, error
    assert case.expected in error
    assert (code, error.count("\n")) == (case.code, case.lines), error
    assert "written" not in output and "sound" not in output
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("rule", "name"), FROM_THE_FRONT_DOOR)
def test_the_front_door_says_the_same(rule: str, name: str, tmp_path: Path, finished: Path) -> None:
    case = next(case for case in CASES if case.rule == rule)
    make(case, tmp_path, finished)
    before = listing(tmp_path)
    done = from_outside(command(name, case.arguments), tmp_path)
    assert listing(tmp_path) == before
    with contextlib.chdir(tmp_path):
        code, _, error = in_process(case.command, case.arguments)
    assert (done.returncode, done.stderr, done.stdout) == (code, error, "")


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (("c.yaml",), {"RANK": "0"}, "environment: got RANK without WORLD_SIZE"),
        (("c.yaml", "device=cuda:9999"), {}, "device: got cuda:9999, but this"),
        (("c.yaml", "device=cuda"), {"CUDA_VISIBLE_DEVICES": ""}, "device: got cuda, but this torch"),
    ],
)
def test_training_refuses_a_wrong_machine(
    arguments: tuple[str, ...], variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    fill(tmp_path)
    before = listing(tmp_path)
    done = from_outside(command("train", arguments), tmp_path, **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (MACHINE_ERROR, "", 1), done.stderr
    assert done.stderr.startswith(f"distgpt: error: {expected}")
    assert listing(tmp_path) == before


@pytest.mark.skipif(not (REPO / ".venv" / "installed-for-dev").exists(), reason="no .venv: start with ./launch/test.sh")
@pytest.mark.parametrize("ranks", ["0", "-1", "1.5"])
def test_the_launcher_refuses_a_wrong_number_of_ranks(ranks: str, tmp_path: Path) -> None:
    fill(tmp_path)
    before = listing(tmp_path)
    done = from_outside([str(REPO / "launch" / "run.sh"), "c.yaml"], tmp_path, NPROC=ranks)
    assert (done.returncode, done.stdout) == (MACHINE_ERROR, ""), done.stderr
    *setting_up, told = done.stderr.splitlines()  # the first start installs what is missing, and says so
    assert told.startswith(f"distgpt: error: NPROC: got '{ranks}', expected a whole number from 1; ")
    assert not any(line.startswith("distgpt: error") for line in setting_up)
    assert listing(tmp_path) == before


def from_outside(arguments: Sequence[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
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
KEYS = [dotted(key) for key, _ in configs.walk_keys()]
ODD = [
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


def odd_text(chance: random.Random) -> str:
    """Characters from anywhere in Unicode."""
    planes = [(0, 32), (32, 127), (32, 127), (127, 256), (0x2000, 0x2070), (0xD800, 0xE000), (0xFE00, 0x11000)]
    return "".join(chr(chance.randrange(*chance.choice(planes))) for _ in range(chance.randrange(1, 9)))


def odd_value(chance: random.Random) -> str:
    """A value that a config might hold by mistake, or worse."""
    if chance.random() < 0.15:
        return odd_text(chance)
    chosen = chance.choice(ODD)
    for _ in range(chance.randrange(10) if chance.random() < 0.1 else 0):
        chosen = chance.choice([f"[{chosen}]", f"{{a: {chosen}}}", f"{{{chosen}: a}}", f"[{chosen}, {chosen}]"])
    return chosen


def mutated_line(chance: random.Random, lines: list[str]) -> None:
    """Change one line, or the order of two."""
    i, j = chance.randrange(len(lines)), chance.randrange(len(lines))
    key, colon, rest = lines[i].partition(":")
    other_key, _, other = lines[j].partition(":")
    match chance.randrange(9):
        case 0:
            del lines[i]
        case 1:
            lines.insert(j, lines[i])
        case 2:
            lines[i], lines[j] = lines[j], lines[i]
        case 3:
            lines[i], lines[j] = f"{key}:{other}", f"{other_key}:{rest}"
        case 4 | 5:
            lines[i] = f"{key}{colon} {odd_value(chance)}"
        case 6:
            lines[i] = " " * chance.randrange(6) + lines[i].strip()
        case 7:
            lines.insert(i, f"{chance.choice([*KEYS, odd_value(chance), odd_text(chance)])}: {odd_value(chance)}")
        case 8:
            at = chance.randrange(len(lines[i]) + 1)
            lines[i] = lines[i][:at] + odd_text(chance) + lines[i][at:]


def mutation(seed: int) -> tuple[bytes, list[str]]:
    """A config that was GPT-tiny's, and overrides; the same for the same seed."""
    chance = random.Random(seed)
    lines = [row for row in TINY.splitlines() if not row.startswith("#")]
    for _ in range(chance.choice([0, 1, 1, 1, 2, 2, 3, 8])):
        if lines:
            mutated_line(chance, lines)
    raw = bytearray("\n".join([*lines, ""]).encode("utf-8", "surrogatepass"))
    if chance.random() < 0.2:
        for _ in range(chance.randrange(1, 5)):
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.05:
        del raw[chance.randrange(len(raw)) :]
    overrides = []
    for _ in range(chance.choice([0, 0, 1, 2])):
        key = chance.choice(KEYS) if chance.random() < 0.8 else odd_value(chance)
        overrides.append(f"{key}{'=' if chance.random() < 0.95 else ''}{odd_value(chance)}".replace("\0", "0"))
    if chance.random() < 0.9:
        overrides.append("tokenizer_encoding=bytes")  # the other takes a tenth of a second to load
    overrides = [one.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape") for one in overrides]
    return bytes(raw), [*overrides, "data=t.npz"]  # without, the sample corpus would be made


def misjudged(seed: int) -> str | None:
    """What is wrong with the answer to a mutated config; None where it is used, or refused as it should be."""
    raw, overrides = mutation(seed)
    Path("c.yaml").write_bytes(raw)
    started_at = time.process_time()  # a busy machine is not our fault
    try:
        code, _, error = in_process("check", ["c.yaml", "--", *overrides])
    except BaseException as failure:
        if isinstance(failure, KeyboardInterrupt):
            raise
        return f"{type(failure).__name__}: {failure}"
    seconds = time.process_time() - started_at
    if seconds > MOST_SECONDS:
        return f"took {seconds:.1f} s"
    if code not in (0, CONFIG_ERROR, DATA_ERROR, TRAINED_ERROR, MACHINE_ERROR):
        return f"exit code {code}"
    if code != 0:
        return unclear(error)
    config = configs.load("c.yaml", overrides)
    Path("again.yaml").write_text(configs.to_yaml(config), encoding="utf-8")
    return None if configs.load("again.yaml") == config and error == "" else f"does not read back to itself: {config}"


@contextlib.contextmanager
def fuzzing(folder: Path) -> Iterator[None]:
    """Work in a folder with tokens for any model."""
    with contextlib.chdir(folder):
        Path("t.npz").write_bytes(npz(train=np.resize(IDS, 9000), val=IDS))
        yield


@pytest.mark.parametrize("part", range(5))
def test_any_mutated_config_is_used_or_refused_in_clear_lines(part: int, tmp_path: Path) -> None:
    with fuzzing(tmp_path):
        for seed in range(part, FUZZ_CASES, 5):
            assert misjudged(seed) is None, f"seed {seed}: {mutation(seed)}"
    assert sorted(path.name for path in tmp_path.iterdir()) in (["c.yaml", "t.npz"], ["again.yaml", "c.yaml", "t.npz"])


def main(cases: int = FUZZ_CASES, first: int = 0) -> int:
    """Fuzz with so many seeds; print each that fails, and return their number."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder, fuzzing(Path(folder)):
        for seed in range(first, first + cases):
            if problem := misjudged(seed):
                failed += 1
                print(f"seed {seed}: {problem!a}\n  {mutation(seed)!a}"[:2000])
    print(f"{cases} configs, {failed} misjudged")
    return failed


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])) > 0)
