"""What is on disk survives a power failure at any moment, and no damaged byte of it is ever taken for a sound one.

`python -m tests.test_power 10000` damages that many times what the tests damage 400 times, and counts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load

from distgpt import checkpoint
from distgpt import config as configs
from distgpt.errors import CheckpointError, ConfigError, DataError
from distgpt.shards import open_tokens
from distgpt.tokenizer import load_saved
from tests.conftest import REPO, environment
from tests.power import EMPTIED, GONE, KEPT, PHASES, UNNAMED, Disk, Folder, Op, read_logs, some

COUNT = 400
"""Damages to each kind of file."""

FIXTURES = Path(__file__).parent / "fixtures"

CONFIG = """
output_dir: {folder}/disk/run
tokenizer_encoding: bytes
model_config: {{n_embd: 8, n_head: 2, n_positions: 8, n_layer: 1}}
data: {folder}/tokens.npz
device: cpu
precision: fp32
compile: off
global_batch_size: 4
batch_size: 2
seq_len: 8
num_warmup_steps: 1
num_training_steps: 8
min_lr: 0.1
max_lr: 0.1
log_every: 1
eval: {{every: 2, max_tokens: 64}}
checkpoint: {{every: 2, keep: 2}}
parallel: {{strategy: {strategy}}}
wandb: disabled
"""
"""What is learned in training makes validation worse, so that an early checkpoint stays the best."""


@dataclasses.dataclass
class Promise:
    """What must be there after a power failure."""

    steps: set[int] = dataclasses.field(default_factory=set)
    """Of the checkpoints that have been published."""
    renamed: set[int] = dataclasses.field(default_factory=set)
    """Of those whose renaming has not been flushed yet."""
    seed: int = 0
    """Of the run that they are checkpoints of."""

    def follow(self, op: Op) -> None:
        """See what an operation promises, whether or not the disk keeps it."""
        if op.kind == "rename" and op.to.startswith("run/checkpoints/step-"):
            self.renamed.add(int(op.to[-8:]))
        elif op.kind == "fsync" and op.path == "run/checkpoints":
            self.steps |= self.renamed
            self.renamed = set()
        elif op.kind == "note" and op.to == "damaged":
            self.steps.remove(max(self.steps))
        elif op.kind == "note" and op.to == "fresh":
            self.steps, self.seed = set(), 1


def broken(folder: Path, promise: Promise) -> str | None:
    """What a rebuilt disk lacks of what was promised, if anything."""
    found, rejected = checkpoint.newest(folder / "run")
    newest = max(promise.steps, default=0)
    if (found.step if found else 0) < newest:
        return f"checkpoint {newest} is lost: found {found and found.step}; {rejected}"
    if found and promise.steps and found.state["config"]["seed"] != promise.seed:
        return f"checkpoint {found.step} of the run before is back"
    if found and not set(range(1, found.step + 1)) <= set(steps_recorded(folder / "run" / "metrics.jsonl")):
        return f"rows up to step {found.step} are not in metrics.jsonl"
    if readable(folder / "run" / "eval.json"):
        if not whole(folder / "run" / "model.safetensors"):
            return "there is an eval.json, and no whole model.safetensors"
        try:
            configs.load(folder / "run" / "config.yaml")
        except ConfigError as error:
            return f"there is an eval.json, and no whole config: {error}"
        tokenizer = folder / "run" / "tokenizer"
        if not builds_a_tokenizer(frozenset((p.name, p.read_bytes()) for p in tokenizer.glob("*"))):
            return "there is an eval.json, and no whole tokenizer"
    return None


@functools.cache
def builds_a_tokenizer(files: frozenset[tuple[str, bytes]]) -> bool:
    """Whether files of such content are a tokenizer's; most disks hold the same."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files:
            (Path(scratch) / name).write_bytes(content)
        with suppress(CheckpointError):
            load_saved(Path(scratch))
            return True
        return False


def steps_recorded(path: Path) -> Iterator[int]:
    """The training steps of which there is a whole row."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "train-loss" in row:
            yield row["step"]


def readable(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def whole(path: Path) -> bool:
    try:
        return "token_embedding.weight" in load(path.read_bytes())
    except (OSError, SafetensorError):
        return False


class Rebuilder:
    """Makes a folder hold what a power failure would leave, one state after another, changing what differs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[str, bytes | None] = {}

    def rebuild(self, left: dict[str, bytes | None]) -> None:
        """Make the folder hold this and nothing else."""
        for path in sorted(self.held.keys() - left.keys(), reverse=True):
            place = self.folder / path
            place.rmdir() if self.held[path] is None else place.unlink()
        for path, content in left.items():
            if content is None:
                (self.folder / path).mkdir(exist_ok=True)
            elif path not in self.held or self.held[path] != content:
                (self.folder / path).write_bytes(content)
        self.held = left


@dataclasses.dataclass
class Replay:
    """What was found by failing after each operation of a run."""

    failures: int = 0
    """Power failures simulated."""
    states: int = 0
    """Distinct disks that they left, each with what had been promised by then."""
    lost: list[str] = dataclasses.field(default_factory=list)


def replay(ops: Sequence[Op], folder: Path, seeds: int = 3, until_lost: bool = False) -> Replay:
    """Fail after each operation, in every way; see whether what was promised until then is there."""
    disk, promise, rebuilder, result = Disk(), Promise(), Rebuilder(folder), Replay()
    seen: set[object] = set()
    for number, op in enumerate(ops):
        disk.apply(op)
        promise.follow(op)
        for luck in (GONE, EMPTIED, UNNAMED, KEPT, *(some(number * seeds + one) for one in range(seeds))):
            result.failures += 1
            left = disk.left(luck)
            state = frozenset(left.items()), frozenset(promise.steps), promise.seed
            if state in seen:
                continue
            seen.add(state)
            result.states += 1
            rebuilder.rebuild(left)
            if fault := broken(folder, promise):
                result.lost.append(f"after operation {number} ({op.kind} {op.path} {op.to}), {luck.name}: {fault}")
                if until_lost:
                    return result
    return result


def record(folder: Path, ranks: int, strategy: str, phases: Sequence[str] = tuple(PHASES)) -> list[Op]:
    """Train in phases, in one process or under torchrun (a start for each phase), and return what was done."""
    for name in ("disk", "logs"):
        (folder / name).mkdir(parents=True)
    shutil.copy(FIXTURES / "tokens.npz", folder)
    (folder / "power.yaml").write_text(CONFIG.format(folder=folder, strategy=strategy))
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    for started in [phases] if ranks == 1 else [[phase] for phase in phases]:
        done = subprocess.run(
            [*launcher, "tests.power", str(folder), *started],
            cwd=REPO,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return read_logs(folder / "logs")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Op]:
    """What one process does."""
    return record(tmp_path_factory.mktemp("alone"), 1, "auto")


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have trained a model of which each has half: to its end, and on from before a damage."""
    folder = tmp_path_factory.mktemp("sharded") / "recorded"
    record(folder, 2, "fsdp", ("first", "damaged"))
    return folder


def test_a_power_failure_at_any_moment_loses_nothing_promised(alone: list[Op], tmp_path: Path) -> None:
    result = replay(alone, tmp_path)
    assert result.lost == []
    assert result.states > 400


def test_nor_does_one_while_two_ranks_save(sharded_folder: Path, tmp_path: Path) -> None:
    ops = read_logs(sharded_folder / "logs")
    flushed = {op.path.rpartition("/")[2] for op in ops if op.kind == "fsync" and "/.step-" in op.path}
    assert {f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)} < flushed
    result = replay(ops, tmp_path)
    assert result.lost == []
    assert result.states > 300


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nor_in_any_phase_of_a_run_on_two_ranks(strategy: str, tmp_path: Path) -> None:
    (tmp_path / "replayed").mkdir()
    result = replay(record(tmp_path / "recorded", 2, strategy), tmp_path / "replayed", seeds=10)
    assert result.lost == []


def test_the_record_has_all_that_can_go_wrong(alone: list[Op]) -> None:
    """Retention that keeps an old best, a checkpoint replaced, one run after another: else the replay proves little."""
    disk, promise, ends = Disk("run"), Promise(), []
    for op in alone:
        if op.kind == "note":
            folder = disk.find("run/checkpoints")
            ends.append(sorted(folder.cached) if isinstance(folder, Folder) else [])
        disk.apply(op)
        promise.follow(op)
    first, more = (["step-00000002", *(f"step-{step:08}" for step in steps)] for steps in ((6, 8), (10, 12)))
    assert ends == [[], first, more, more]
    renamed = [op.to for op in alone if op.kind == "rename" and op.path.startswith("run/checkpoints/.step")]
    assert renamed.count("run/checkpoints/step-00000012") == 2 and len(renamed) == 9
    assert sum(op.kind == "rename" and op.to == "run/eval.json" for op in alone) == 4
    assert promise.steps == {2, 4}


NEEDED = {
    "a data file": r"run/checkpoints/\.step-.*\.safetensors",
    "state.json": r"run/checkpoints/\.step-.*/state\.json",
    "the manifest": r"run/checkpoints/\.step-.*/manifest\.json",
    "the partial folder": r"run/checkpoints/\.step-[^/]*",
    "the folder of checkpoints": r"run/checkpoints",
    "the output folder": r"run",
    "the metrics": r"run/metrics\.jsonl",
    "the metrics cut back": r"run/\.metrics\.jsonl\..*",
    "the weights": r"run/\.model\.safetensors\..*",
    "the config": r"run/\.config\.yaml\..*",
}


@pytest.mark.parametrize("flushed", NEEDED)
def test_without_any_of_its_flushes_a_run_loses_something(flushed: str, alone: list[Op], tmp_path: Path) -> None:
    dropped = [
        dataclasses.replace(op, dropped=op.kind == "fsync" and re.fullmatch(NEEDED[flushed], op.path) is not None)
        for op in alone
    ]
    assert any(op.dropped for op in dropped)
    assert replay(dropped, tmp_path, until_lost=True).lost


def test_a_flush_in_the_wrong_order_is_too_late(alone: list[Op], tmp_path: Path) -> None:
    """Here a checkpoint's entries are flushed only after its name: all flushes are made, and it may be empty."""
    late: list[Op] = []
    seal: Op | None = None
    for op in alone:
        late.append(op)
        if op.kind == "rename" and op.to.startswith("run/checkpoints/step-"):
            sealed = max(i for i, one in enumerate(late) if one.kind == "fsync" and one.path == op.path)
            seal = dataclasses.replace(late.pop(sealed), path=op.to)
        elif seal and op.kind == "fsync" and op.path == "run/checkpoints":
            late.append(seal)
            seal = None
    assert len(late) == len(alone)
    assert replay(late, tmp_path, until_lost=True).lost


@pytest.mark.parametrize("seed", range(5))
def test_what_a_power_failure_leaves_goes_on_to_the_same_end(seed: int, alone: list[Op], tmp_path: Path) -> None:
    from distgpt import train

    first = alone[: next(i for i, op in enumerate(alone) if op.to == "more")]
    disk = Disk("run")
    for op in first:
        disk.apply(op)
    end = disk.left(KEPT)["run/model.safetensors"]
    disk = Disk("run")
    for op in first[: random.Random(seed).randrange(len(first))]:
        disk.apply(op)
    Rebuilder(tmp_path).rebuild(disk.left(some(seed)))
    shutil.copy(FIXTURES / "tokens.npz", tmp_path)
    (tmp_path / "power.yaml").write_text(CONFIG.format(folder=tmp_path, strategy="auto"))
    train.main([str(tmp_path / "power.yaml"), f"output_dir={tmp_path / 'run'}", *PHASES["first"]])
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == end


def test_a_disk_keeps_what_has_been_flushed_and_nothing_else_for_sure() -> None:
    disk = Disk("run")

    def do(kind: str, path: str, **more: object) -> None:
        disk.apply(Op(0, kind, path, **more))  # type: ignore[arg-type]

    do("create", "run/a")
    do("fsync", "run/a", content=b"one")
    assert disk.left(GONE) == {"run": None}  # a file without a name
    do("fsync", "run", names=("a",))
    assert disk.left(GONE) == {"run": None, "run/a": b"one"}
    do("write", "run/a", content=b"one two")
    assert disk.left(GONE)["run/a"] == disk.left(EMPTIED)["run/a"] == b"one"
    assert {disk.left(some(seed))["run/a"] for seed in range(99)} >= {b"one", b"one t", b"one t\0\0", b"one two"}
    do("truncate", "run/a")
    assert (disk.left(GONE)["run/a"], disk.left(EMPTIED)["run/a"], disk.left(KEPT)["run/a"]) == (b"one", b"", b"")
    do("rename", "run/a", to="run/b")
    assert {tuple(disk.left(some(seed))) for seed in range(9)} == {("run", "run/a"), ("run", "run/b")}
    with pytest.raises(AssertionError, match="replayed"):  # an operation went unheard
        do("fsync", "run", names=("a",))


def test_the_recorder_hears_what_is_done_by_whatever_means(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "elsewhere").mkdir()
    script = """
import os, shutil, sys, tempfile
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from tests.power import Recorder
folder = Path(sys.argv[1])
Recorder(folder / "disk", folder / "log.jsonl")
os.chdir(folder / "disk")
os.makedirs("a/b")
save_file({"x": np.zeros(2)}, "a/b/rust")
os.rename("a/b/rust", "a/b/heard")
shutil.copy("a/b/heard", "a/b/copied")
descriptor = os.open("a", os.O_RDONLY)
os.mkdir("inside", dir_fd=descriptor)
os.replace("b", "c", src_dir_fd=descriptor, dst_dir_fd=descriptor)
os.fsync(descriptor)
with open("a/c/copied", "ab") as file:
    file.write(b"more")
    file.flush()
    os.fsync(file)
tempfile.TemporaryFile(dir=".").close()
(folder / "elsewhere" / "file").write_text("")
shutil.rmtree("a")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=REPO, env=environment(), check=True)
    (tmp_path / "log.jsonl").rename(tmp_path / "elsewhere" / "log.jsonl")
    ops = read_logs(tmp_path / "elsewhere")
    assert not any("elsewhere" in op.path for op in ops)
    disk, most = Disk(), 0
    for op in ops:
        disk.apply(op)
        most = max(most, len(disk.left(KEPT)))
    assert most == 5 and disk.left(KEPT) == {}  # a, inside, c, heard, copied


@contextmanager
def damaged(path: Path, dice: random.Random) -> Iterator[str]:
    """A file with another value for one random byte, or cut short; gives what was done, and takes it back after."""
    raw = path.read_bytes()
    where = dice.randrange(len(raw))
    if dice.random() < 0.8:
        value = raw[where] ^ dice.randrange(1, 256)
        path.write_bytes(raw[:where] + bytes([value]) + raw[where + 1 :])
        done = f"{path.name}: byte {where} is {value}, was {raw[where]}"
    else:
        path.write_bytes(raw[:where])
        done = f"{path.name}: cut to {where} of {len(raw)} bytes"
    try:
        yield done
    finally:
        path.write_bytes(raw)


def damage_checkpoint(folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """Damage any of a checkpoint's files, so many times; each must be found, and its place named."""
    dice, found = random.Random(seed), Counter[str]()
    files = sorted(folder.iterdir())
    for _ in range(count):
        with damaged(dice.choice(files), dice) as done:
            try:
                checkpoint.verify(folder)
            except CheckpointError as error:
                assert str(folder) in str(error), f"{done}: {error}"
                found["found"] += 1
            else:
                raise AssertionError(f"not found: {done}")
    checkpoint.verify(folder)
    return found


Contents = dict[str, tuple[str, bytes]]
"""The type and the tokens of each array in a file."""


def read_all(path: Path) -> Contents:
    """What a token file holds, checked as a run checks it. Raises DataError."""
    before = set(Path("/proc/self/fd").iterdir())
    try:
        arrays = open_tokens(path)
        for array in arrays.values():
            array.check(257)
            array.verify()
        return {name: (str(a.dtype), a.read(0, len(a), 257).tobytes()) for name, a in arrays.items()}
    finally:
        for opened in set(Path("/proc/self/fd").iterdir()) - before:
            with suppress(OSError):  # the one that listed them
                os.close(int(opened.name))


def damage_tokens(target: Path, tokens: Path, count: int, seed: int = 0) -> Counter[str]:
    """Damage a file, so many times, from which `tokens` is read; each must be found, or move no token.

    A run asks for the arrays by name, so that one it does not find is found to be missing.
    """
    dice, found, whole = random.Random(seed), Counter[str](), read_all(tokens)
    for _ in range(count):
        with damaged(target, dice) as done:
            try:
                got = read_all(tokens)
            except DataError as error:
                assert str(tokens) in str(error), f"{done}: {error}"
                found["found"] += 1
            else:
                missing = whole.keys() - got.keys()
                assert all(got[name] == whole[name] for name in whole.keys() - missing), f"wrong tokens: {done}"
                found["found" if missing else "harmless"] += 1
        if target == tokens:
            shutil.rmtree(unpacked(tokens), ignore_errors=True)
    assert read_all(tokens) == whole
    return found


def unpacked(tokens: Path) -> Path:
    """The folder where the arrays of a compressed file are kept."""
    return tokens.with_name(tokens.name + ".unpacked")


def token_files(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """Kinds of token files: what each is called, the file to damage, and the file to read."""
    ids = np.random.default_rng(0).integers(0, 257, 600).astype(np.uint16)
    for name, save in (("stored", np.savez), ("compressed", np.savez_compressed)):
        save(folder / f"{name}.npz", train=ids[:500], val=ids[500:])
        yield name, folder / f"{name}.npz", folder / f"{name}.npz"
    read_all(folder / "compressed.npz")
    yield "unpacked", next(unpacked(folder / "compressed.npz").glob("train*")), folder / "compressed.npz"


def test_every_damage_to_a_checkpoint_is_found(tmp_path: Path, sharded_folder: Path) -> None:
    shutil.copytree(FIXTURES / "checkpoint-format-1", tmp_path / "alone")
    shutil.copytree(sharded_folder / "disk" / "run" / "checkpoints" / "step-00000012", tmp_path / "sharded")
    for folder in (tmp_path / "alone", tmp_path / "sharded"):
        assert damage_checkpoint(folder, COUNT) == {"found": COUNT}


def test_a_line_that_ends_otherwise_is_damage(tmp_path: Path) -> None:
    """Python reads a carriage return as the end of a line: so rare a flip that no random one meets it."""
    folder = tmp_path / "step-00000004"
    shutil.copytree(FIXTURES / "checkpoint-format-1", folder)
    manifest = folder / checkpoint.MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b"\n", b"\r", 1))
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
        checkpoint.verify(folder)


def test_no_damage_to_a_token_file_changes_a_token(tmp_path: Path) -> None:
    for _, target, tokens in token_files(tmp_path):
        found = damage_tokens(target, tokens, COUNT)
        assert found.total() == COUNT and found["found"] > COUNT / 2


def main() -> None:
    """Damage each kind of file as many times as the first argument says, and count what was found."""
    count, counts = int(sys.argv[1]), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, ranks, strategy in (("alone", 1, "auto"), ("sharded", 2, "fsdp")):
            record(folder / name, ranks, strategy, ["first"])
            newest, _ = checkpoint.newest(folder / name / "disk" / "run")
            assert newest is not None
            counts[f"checkpoint, {name}"] = damage_checkpoint(newest.path, count)
        for name, target, tokens in token_files(folder):
            counts[f"tokens, {name}"] = damage_tokens(target, tokens, count)
    told = (f"{name}: " + ", ".join(f"{n} {kind}" for kind, n in found.items()) for name, found in counts.items())
    print(f"{count} each, none missed: {'; '.join(told)}")


if __name__ == "__main__":
    main()
