"""Everything saved survives a power failure at any moment, and no damaged byte is ever used as if it were valid.

`python -m tests.test_power 10000` makes that many damages of each kind, where the tests make 400, and counts them.
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

from distgpt.checkpoint import store
from distgpt.config.loader import load_config
from distgpt.data.token_files import open_token_file
from distgpt.data.tokenizer import load_saved_tokenizer
from distgpt.errors import CheckpointError, ConfigError, DataError
from tests.conftest import REPO, environment
from tests.power import (
    ALL_KEPT,
    ALL_LOST,
    CONTENT_ONLY,
    NAMES_ONLY,
    PHASES,
    Disk,
    Folder,
    Op,
    random_outcome,
    read_logs,
)

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
"""The learning rate is so high that the validation loss grows, so that an early checkpoint stays the best."""


@dataclasses.dataclass
class Guarantee:
    """What must be on disk after a power failure."""

    steps: set[int] = dataclasses.field(default_factory=set)
    """Of the checkpoints that were committed."""
    renamed: set[int] = dataclasses.field(default_factory=set)
    """Of those whose rename was not flushed yet."""
    seed: int = 0
    """Of the run that the checkpoints belong to."""

    def update(self, op: Op) -> None:
        """Add what an operation guarantees, whether or not the disk keeps it."""
        if op.kind == "rename" and op.to.startswith("run/checkpoints/step-"):
            self.renamed.add(int(op.to[-8:]))
        elif op.kind == "fsync" and op.path == "run/checkpoints":
            self.steps |= self.renamed
            self.renamed = set()
        elif op.kind == "note" and op.to == "damaged":
            self.steps.remove(max(self.steps))
        elif op.kind == "note" and op.to == "fresh":
            self.steps, self.seed = set(), 1


def find_loss(folder: Path, guarantee: Guarantee) -> str | None:
    """What a rebuilt disk lacks of what was guaranteed, if anything."""
    latest, skipped = store.latest_valid(folder / "run")
    guaranteed_step = max(guarantee.steps, default=0)
    if (latest.step if latest else 0) < guaranteed_step:
        return f"checkpoint {guaranteed_step} is lost: got {latest and latest.step}; {skipped}"
    if latest and guarantee.steps and latest.state["run"]["config"]["seed"] != guarantee.seed:
        return f"checkpoint {latest.step} of the previous run is back"
    if latest and not set(range(1, latest.step + 1)) <= set(recorded_steps(folder / "run" / "metrics.jsonl")):
        return f"rows up to step {latest.step} are not in metrics.jsonl"
    if is_json_object(folder / "run" / "eval.json"):
        if not is_complete_model(folder / "run" / "model.safetensors"):
            return "there is an eval.json, but no complete model.safetensors"
        try:
            load_config(folder / "run" / "config.yaml")
        except ConfigError as error:
            return f"there is an eval.json, but no complete config: {error}"
        tokenizer = folder / "run" / "tokenizer"
        if not is_complete_tokenizer(frozenset((p.name, p.read_bytes()) for p in tokenizer.glob("*"))):
            return "there is an eval.json, but no complete tokenizer"
    return None


@functools.cache
def is_complete_tokenizer(files: frozenset[tuple[str, bytes]]) -> bool:
    """Whether a tokenizer can be loaded from files of this content. Cached, since most disks hold the same files."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files:
            (Path(scratch) / name).write_bytes(content)
        with suppress(CheckpointError):
            load_saved_tokenizer(Path(scratch))
            return True
        return False


def recorded_steps(path: Path) -> Iterator[int]:
    """The training steps with a complete row."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "train-loss" in row:
            yield row["step"]


def is_json_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def is_complete_model(path: Path) -> bool:
    try:
        return "token_embedding.weight" in load(path.read_bytes())
    except (OSError, SafetensorError):
        return False


class Rebuilder:
    """Makes a folder hold one disk state after another, changing only what differs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content: dict[str, bytes | None] = {}

    def rebuild(self, content: dict[str, bytes | None]) -> None:
        """Make the folder hold exactly this: files by path with their content, folders with None."""
        for path in sorted(self.content.keys() - content.keys(), reverse=True):
            absolute = self.folder / path
            absolute.rmdir() if self.content[path] is None else absolute.unlink()
        for path, raw in content.items():
            if raw is None:
                (self.folder / path).mkdir(exist_ok=True)
            elif path not in self.content or self.content[path] != raw:
                (self.folder / path).write_bytes(raw)
        self.content = content


@dataclasses.dataclass
class Replay:
    """The result of simulating a failure after each operation of a run."""

    failures: int = 0
    """Power failures simulated."""
    states: int = 0
    """Distinct disks that they left, each with what was guaranteed by then."""
    losses: list[str] = dataclasses.field(default_factory=list)


def replay(ops: Sequence[Op], folder: Path, seeds: int = 3, stop_at_loss: bool = False) -> Replay:
    """Simulate failures of every outcome after each operation, and check what was guaranteed by then."""
    disk, guarantee, rebuilder, result = Disk(), Guarantee(), Rebuilder(folder), Replay()
    checked: set[object] = set()
    for number, op in enumerate(ops):
        disk.apply(op)
        guarantee.update(op)
        random_outcomes = [random_outcome(number * seeds + i) for i in range(seeds)]
        for outcome in (ALL_LOST, NAMES_ONLY, CONTENT_ONLY, ALL_KEPT, *random_outcomes):
            result.failures += 1
            content = disk.after_failure(outcome)
            state = frozenset(content.items()), frozenset(guarantee.steps), guarantee.seed
            if state in checked:
                continue
            checked.add(state)
            result.states += 1
            rebuilder.rebuild(content)
            if loss := find_loss(folder, guarantee):
                result.losses.append(f"after operation {number} ({op.kind} {op.path} {op.to}), {outcome.name}: {loss}")
                if stop_at_loss:
                    return result
    return result


def record(folder: Path, ranks: int, strategy: str, phases: Sequence[str] = tuple(PHASES)) -> list[Op]:
    """Train in phases, in one process or with one torchrun per phase, and return the operations."""
    for name in ("disk", "logs"):
        (folder / name).mkdir(parents=True)
    shutil.copy(FIXTURES / "tokens.npz", folder)
    (folder / "power.yaml").write_text(CONFIG.format(folder=folder, strategy=strategy))
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    # A test compares this run's weights with those that its own process computes, with as many threads.
    num_threads = {name: value for name, value in os.environ.items() if name == "OMP_NUM_THREADS"}
    for phases_of_launch in [phases] if ranks == 1 else [[phase] for phase in phases]:
        done = subprocess.run(
            [*launcher, "tests.power", str(folder), *phases_of_launch],
            cwd=REPO,
            env=environment(**num_threads),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return read_logs(folder / "logs")


@pytest.fixture(scope="module")
def single_process_ops(tmp_path_factory: pytest.TempPathFactory) -> list[Op]:
    """The operations of a run in one process."""
    return record(tmp_path_factory.mktemp("single"), 1, "auto")


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of two FSDP ranks that train to the end, and resume after their last checkpoint was damaged."""
    folder = tmp_path_factory.mktemp("sharded") / "recorded"
    record(folder, 2, "fsdp", ("first", "damaged"))
    return folder


def test_power_failure_at_any_moment_loses_nothing_guaranteed(single_process_ops: list[Op], tmp_path: Path) -> None:
    result = replay(single_process_ops, tmp_path)
    assert result.losses == []
    assert result.states > 400


def test_power_failure_while_two_ranks_save_loses_nothing_guaranteed(sharded_folder: Path, tmp_path: Path) -> None:
    ops = read_logs(sharded_folder / "logs")
    flushed = {op.path.rpartition("/")[2] for op in ops if op.kind == "fsync" and "/.step-" in op.path}
    assert {f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)} < flushed
    result = replay(ops, tmp_path)
    assert result.losses == []
    assert result.states > 300


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_power_failure_in_any_phase_of_a_two_rank_run_loses_nothing_guaranteed(strategy: str, tmp_path: Path) -> None:
    (tmp_path / "replayed").mkdir()
    result = replay(record(tmp_path / "recorded", 2, strategy), tmp_path / "replayed", seeds=10)
    assert result.losses == []


def test_recording_covers_everything_that_can_go_wrong(single_process_ops: list[Op]) -> None:
    """Pruning that keeps an old best, a replaced checkpoint, a second run: without these the replay proves little."""
    disk, guarantee, checkpoints_at_notes = Disk("run"), Guarantee(), []
    for op in single_process_ops:
        if op.kind == "note":
            folder = disk.lookup("run/checkpoints")
            checkpoints_at_notes.append(sorted(folder.cached) if isinstance(folder, Folder) else [])
        disk.apply(op)
        guarantee.update(op)
    first, more = (["step-00000002", *(f"step-{step:08}" for step in steps)] for steps in ((6, 8), (10, 12)))
    assert checkpoints_at_notes == [[], first, more, more]
    commits = [
        op.to for op in single_process_ops if op.kind == "rename" and op.path.startswith("run/checkpoints/.step")
    ]
    assert commits.count("run/checkpoints/step-00000012") == 2 and len(commits) == 9
    assert sum(op.kind == "rename" and op.to == "run/eval.json" for op in single_process_ops) == 4
    assert guarantee.steps == {2, 4}


NECESSARY_FSYNCS = {
    "a data file": r"run/checkpoints/\.step-.*\.safetensors",
    "state.json": r"run/checkpoints/\.step-.*/state\.json",
    "the manifest": r"run/checkpoints/\.step-.*/manifest\.json",
    "the staging folder": r"run/checkpoints/\.step-[^/]*",
    "the folder of checkpoints": r"run/checkpoints",
    "the output folder": r"run",
    "the metrics": r"run/metrics\.jsonl",
    "the truncated metrics": r"run/\.metrics\.jsonl\..*",
    "the weights": r"run/\.model\.safetensors\..*",
    "the config": r"run/\.config\.yaml\..*",
}


@pytest.mark.parametrize("flushed", NECESSARY_FSYNCS)
def test_every_fsync_is_necessary(flushed: str, single_process_ops: list[Op], tmp_path: Path) -> None:
    pattern = NECESSARY_FSYNCS[flushed]
    ops = [
        dataclasses.replace(op, dropped=op.kind == "fsync" and re.fullmatch(pattern, op.path) is not None)
        for op in single_process_ops
    ]
    assert any(op.dropped for op in ops)
    assert replay(ops, tmp_path, stop_at_loss=True).losses


def test_fsync_in_the_wrong_order_is_too_late(single_process_ops: list[Op], tmp_path: Path) -> None:
    """Every fsync is made, but a checkpoint's entries are flushed only after its rename: it may then be empty."""
    reordered: list[Op] = []
    late_fsync: Op | None = None
    for op in single_process_ops:
        reordered.append(op)
        if op.kind == "rename" and op.to.startswith("run/checkpoints/step-"):
            index = max(i for i, other in enumerate(reordered) if other.kind == "fsync" and other.path == op.path)
            late_fsync = dataclasses.replace(reordered.pop(index), path=op.to)
        elif late_fsync and op.kind == "fsync" and op.path == "run/checkpoints":
            reordered.append(late_fsync)
            late_fsync = None
    assert len(reordered) == len(single_process_ops)
    assert replay(reordered, tmp_path, stop_at_loss=True).losses


@pytest.mark.parametrize("seed", range(5))
def test_resume_after_power_failure_ends_with_identical_weights(
    seed: int, single_process_ops: list[Op], tmp_path: Path
) -> None:
    from distgpt import train

    first_phase = single_process_ops[: next(i for i, op in enumerate(single_process_ops) if op.to == "more")]
    disk = Disk("run")
    for op in first_phase:
        disk.apply(op)
    final_weights = disk.after_failure(ALL_KEPT)["run/model.safetensors"]
    disk = Disk("run")
    for op in first_phase[: random.Random(seed).randrange(len(first_phase))]:
        disk.apply(op)
    Rebuilder(tmp_path).rebuild(disk.after_failure(random_outcome(seed)))
    shutil.copy(FIXTURES / "tokens.npz", tmp_path)
    (tmp_path / "power.yaml").write_text(CONFIG.format(folder=tmp_path, strategy="auto"))
    train.main([str(tmp_path / "power.yaml"), f"output_dir={tmp_path / 'run'}", *PHASES["first"]])
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == final_weights


def test_simulated_disk_guarantees_only_what_was_flushed() -> None:
    disk = Disk("run")

    def do(kind: str, path: str, **more: object) -> None:
        disk.apply(Op(0, kind, path, **more))  # type: ignore[arg-type]

    do("create", "run/a")
    do("fsync", "run/a", content=b"one")
    assert disk.after_failure(ALL_LOST) == {"run": None}  # a file without a name
    do("fsync", "run", names=("a",))
    assert disk.after_failure(ALL_LOST) == {"run": None, "run/a": b"one"}
    do("write", "run/a", content=b"one two")
    assert disk.after_failure(ALL_LOST)["run/a"] == disk.after_failure(NAMES_ONLY)["run/a"] == b"one"
    random_contents = {disk.after_failure(random_outcome(seed))["run/a"] for seed in range(99)}
    assert random_contents >= {b"one", b"one t", b"one t\0\0", b"one two"}
    do("truncate", "run/a")
    contents = [disk.after_failure(outcome)["run/a"] for outcome in (ALL_LOST, NAMES_ONLY, ALL_KEPT)]
    assert contents == [b"one", b"", b""]
    do("rename", "run/a", to="run/b")
    random_names = {tuple(disk.after_failure(random_outcome(seed))) for seed in range(9)}
    assert random_names == {("run", "run/a"), ("run", "run/b")}
    with pytest.raises(AssertionError, match="replayed"):  # an operation was not recorded
        do("fsync", "run", names=("a",))


def test_recorder_sees_every_way_to_change_files(tmp_path: Path) -> None:
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
os.rename("a/b/rust", "a/b/renamed")
shutil.copy("a/b/renamed", "a/b/copied")
fd = os.open("a", os.O_RDONLY)
os.mkdir("inside", dir_fd=fd)
os.replace("b", "c", src_dir_fd=fd, dst_dir_fd=fd)
os.fsync(fd)
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
    disk, max_entries = Disk(), 0
    for op in ops:
        disk.apply(op)
        max_entries = max(max_entries, len(disk.after_failure(ALL_KEPT)))
    assert max_entries == 5 and disk.after_failure(ALL_KEPT) == {}  # a, inside, c, renamed, copied


@contextmanager
def damage(path: Path, rng: random.Random) -> Iterator[str]:
    """Change one random byte of a file, or cut it short; yields what was done. The file is restored afterwards."""
    raw = path.read_bytes()
    position = rng.randrange(len(raw))
    if rng.random() < 0.8:
        value = raw[position] ^ rng.randrange(1, 256)
        path.write_bytes(raw[:position] + bytes([value]) + raw[position + 1 :])
        description = f"{path.name}: byte {position} is {value}, was {raw[position]}"
    else:
        path.write_bytes(raw[:position])
        description = f"{path.name}: cut to {position} of {len(raw)} bytes"
    try:
        yield description
    finally:
        path.write_bytes(raw)


def damage_checkpoint(folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """Damage random files of a checkpoint `count` times. Each damage must be detected and its path named."""
    rng, outcomes = random.Random(seed), Counter[str]()
    files = sorted(folder.iterdir())
    for _ in range(count):
        with damage(rng.choice(files), rng) as description:
            try:
                store.verify(folder)
            except CheckpointError as error:
                assert str(folder) in str(error), f"{description}: {error}"
                outcomes["detected"] += 1
            else:
                raise AssertionError(f"not detected: {description}")
    store.verify(folder)
    return outcomes


Arrays = dict[str, tuple[str, bytes]]
"""The dtype and the tokens of each array in a file."""


def read_all(path: Path) -> Arrays:
    """The content of a token file, checked as a run checks it. Raises DataError."""
    open_before = set(Path("/proc/self/fd").iterdir())
    try:
        arrays = open_token_file(path)
        for array in arrays.values():
            array.check_ids(257)
            array.check_crc()
        return {name: (str(a.dtype), a.read(0, len(a), 257).tobytes()) for name, a in arrays.items()}
    finally:
        for fd in set(Path("/proc/self/fd").iterdir()) - open_before:
            with suppress(OSError):  # the descriptor that listed them
                os.close(int(fd.name))


def damage_tokens(target: Path, tokens: Path, count: int, seed: int = 0) -> Counter[str]:
    """Damage `target`, from which `tokens` is read, `count` times. Each must be detected or change no token.

    A run needs the arrays by name, so that a missing array counts as detected.
    """
    rng, outcomes, undamaged = random.Random(seed), Counter[str](), read_all(tokens)
    for _ in range(count):
        with damage(target, rng) as description:
            try:
                arrays = read_all(tokens)
            except DataError as error:
                assert str(tokens) in str(error), f"{description}: {error}"
                outcomes["detected"] += 1
            else:
                missing = undamaged.keys() - arrays.keys()
                present = undamaged.keys() - missing
                assert all(arrays[name] == undamaged[name] for name in present), f"wrong tokens: {description}"
                outcomes["detected" if missing else "harmless"] += 1
        if target == tokens:
            shutil.rmtree(unpacked_dir(tokens), ignore_errors=True)
    assert read_all(tokens) == undamaged
    return outcomes


def unpacked_dir(tokens: Path) -> Path:
    """The folder with the unpacked arrays of a compressed file."""
    return tokens.with_name(tokens.name + ".unpacked")


def token_files(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """(kind, file to damage, file to read) for each kind of token file."""
    ids = np.random.default_rng(0).integers(0, 257, 600).astype(np.uint16)
    for name, save in (("stored", np.savez), ("compressed", np.savez_compressed)):
        save(folder / f"{name}.npz", train=ids[:500], val=ids[500:])
        yield name, folder / f"{name}.npz", folder / f"{name}.npz"
    read_all(folder / "compressed.npz")
    yield "unpacked", next(unpacked_dir(folder / "compressed.npz").glob("train*")), folder / "compressed.npz"


def test_every_damage_to_a_checkpoint_is_detected(tmp_path: Path, sharded_folder: Path) -> None:
    shutil.copytree(FIXTURES / "checkpoint-format-1", tmp_path / "format-1")
    shutil.copytree(sharded_folder / "disk" / "run" / "checkpoints" / "step-00000012", tmp_path / "sharded")
    for folder in (tmp_path / "format-1", tmp_path / "sharded"):
        assert damage_checkpoint(folder, COUNT) == {"detected": COUNT}


def test_changed_line_ending_in_the_manifest_is_damage(tmp_path: Path) -> None:
    """Python reads a carriage return as the end of a line, so that JSON does not show this change."""
    folder = tmp_path / "step-00000004"
    shutil.copytree(FIXTURES / "checkpoint-format-1", folder)
    manifest = folder / store.MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b"\n", b"\r", 1))
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
        store.verify(folder)


def test_damage_to_a_token_file_never_changes_a_token(tmp_path: Path) -> None:
    for _, target, tokens in token_files(tmp_path):
        outcomes = damage_tokens(target, tokens, COUNT)
        assert outcomes.total() == COUNT and outcomes["detected"] > COUNT / 2


def main() -> None:
    """Damage each kind of file as many times as the first argument says, and count the outcomes."""
    count, counts = int(sys.argv[1]), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, ranks, strategy in (("single", 1, "auto"), ("sharded", 2, "fsdp")):
            record(folder / name, ranks, strategy, ["first"])
            latest, _ = store.latest_valid(folder / name / "disk" / "run")
            assert latest is not None
            counts[f"checkpoint, {name}"] = damage_checkpoint(latest.path, count)
        for name, target, tokens in token_files(folder):
            counts[f"tokens, {name}"] = damage_tokens(target, tokens, count)
    results = (f"{name}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()) for name, kinds in counts.items())
    print(f"{count} each, none missed: {'; '.join(results)}")


if __name__ == "__main__":
    main()
