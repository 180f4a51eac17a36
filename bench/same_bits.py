"""Record what runs of many settings compute, bit by bit, and compare two records: refactors must not change it.

    python -m bench.same_bits record before.json [--repo OTHER_CHECKOUT] [--only SUBSTRING]
    python -m bench.same_bits compare before.json after.json

`record` trains a small model from the command line under each setting and keeps every logged loss and gradient norm
(as hexadecimal floats), and a hash of every tensor of the last checkpoint. Settings that end in "resumed" delete what
the run wrote after its middle and run the same command again. About ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIG = """
output_dir: {folder}/run
data: {folder}/tokens.npz
tokenizer_encoding: gpt2
model_config: {{n_embd: 128, n_head: 4, n_positions: 64, n_layer: 2}}
device: cpu
batch_size: 8
seq_len: 64
num_warmup_steps: 3
num_training_steps: 12
min_lr: 1e-4
max_lr: 1e-3
log_every: 1
eval: {{every: 5, max_tokens: 2048}}
checkpoint: {{every: 6, keep: 2}}
wandb: disabled
"""

FP32, BF16 = ("precision=fp32", "compile=off"), ("precision=bf16", "compile=off")
FP32_COMPILED, BF16_COMPILED = ("precision=fp32", "compile=on"), ("precision=bf16", "compile=on")
NARROW = ("model_config.n_embd=32", "model_config.n_head=2")
ACCUMULATE = ("global_batch_size=10", "batch_size=2")

SETTINGS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 rank fp32": (1, FP32),
    "1 rank fp32 accumulated": (1, (*FP32, *ACCUMULATE)),
    "1 rank fp32 dropout": (1, (*FP32, "p_dropout=0.1")),
    "1 rank fp32 documents": (1, (*FP32, "mask_documents=true")),
    "1 rank fp32 full recomputation": (1, (*FP32, "activation_checkpointing=full")),
    "1 rank fp32 compiled": (1, FP32_COMPILED),
    "1 rank bf16": (1, BF16),
    "1 rank bf16 narrow heads": (1, (*BF16, *NARROW)),
    "1 rank bf16 compiled": (1, BF16_COMPILED),
    "1 rank bf16 compiled narrow heads": (1, (*BF16_COMPILED, *NARROW)),
    "1 rank bf16 compiled dropout": (1, (*BF16_COMPILED, "p_dropout=0.1")),
    "1 rank bf16 compiled documents": (1, (*BF16_COMPILED, "mask_documents=true")),
    "1 rank bf16 compiled selective recomputation": (1, (*BF16_COMPILED, "activation_checkpointing=selective")),
    "1 rank bf16 compiled resumed": (1, BF16_COMPILED),
    "2 ranks ddp fp32": (2, (*FP32, *ACCUMULATE, "parallel.strategy=ddp")),
    "2 ranks ddp bf16 compiled": (2, (*BF16_COMPILED, "parallel.strategy=ddp")),
    "2 ranks fsdp bf16 compiled": (2, (*BF16_COMPILED, *ACCUMULATE, "parallel.strategy=fsdp")),
    "3 ranks fsdp fp32 selective recomputation": (
        3,
        (*FP32, "parallel.strategy=fsdp", "activation_checkpointing=selective"),
    ),
    "3 ranks ddp fp32 dropout resumed": (3, (*FP32, "parallel.strategy=ddp", "p_dropout=0.1")),
    "4 ranks hsdp fp32 documents": (
        4,
        (*FP32, "parallel.strategy=hsdp", "parallel.shard_ranks=2", "mask_documents=true"),
    ),
}
"""For each setting, the number of ranks and what it changes of CONFIG."""


def make_tokens(path: Path) -> None:
    """GPT-2 ids of a Zipf-like distribution, with an end-of-text about every 30 tokens."""
    import numpy as np

    generator = np.random.default_rng(0)

    def draw(length: int) -> Any:
        ids = np.minimum(generator.zipf(1.3, length), 50256).astype(np.uint16)
        return np.where(generator.random(length) < 1 / 30, np.uint16(50256), ids)

    np.savez(path, train=draw(60_000), val=draw(3_001))


def train(repo: Path, folder: Path, ranks: int, overrides: tuple[str, ...]) -> None:
    """Run the training command of a checkout to its end."""
    launcher = [sys.executable, "-m", "distgpt.train"]
    if ranks > 1:
        launcher[2:] = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "distgpt.train"]
    environment = os.environ | {"PYTHONPATH": str(repo)}
    command = [*launcher, str(folder / "config.yaml"), *overrides]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def read_results(output_dir: Path) -> dict[str, Any]:
    """Every logged loss and gradient norm, and a hash of every tensor of the last checkpoint."""
    from safetensors.torch import load_file

    curve = []
    for line in (output_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        values = {
            name: row[name].hex() for name in ("train-loss", "grad-norm", "val-loss") if row.get(name) is not None
        }
        if values:
            curve.append({"step": row["step"]} | values)
    last = max((output_dir / "checkpoints").glob("step-*"))
    hashes = {}
    for path in sorted(last.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            hashes[f"{name} in {path.name}"] = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
    return {"curve": curve, "tensors": hashes}


def forget_second_half(output_dir: Path) -> None:
    """Leave a run as if it had been killed between its checkpoint of step 6 and the end."""
    shutil.rmtree(output_dir / "checkpoints/step-00000012")
    for name in ("eval.json", "model.safetensors"):
        (output_dir / name).unlink()


def record(repo: Path, output: Path, only: str) -> None:
    """Run every setting whose name contains `only`, and write what each computed."""
    results = {}
    for name, (ranks, overrides) in SETTINGS.items():
        if only not in name:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
            make_tokens(folder / "tokens.npz")
            train(repo, folder, ranks, overrides)
            if name.endswith("resumed"):
                forget_second_half(folder / "run")
                train(repo, folder, ranks, overrides)
            results[name] = read_results(folder / "run")
        print(name, results[name]["curve"][-1], flush=True)
        output.write_text(json.dumps(results, indent=1))


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print, for each setting, whether the records are identical; returns how many settings differ."""
    different = 0
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if old == new:
            continue
        different += 1
        pairs = [
            (float.fromhex(a[key]), float.fromhex(b[key]))
            for a, b in zip(old["curve"], new["curve"], strict=True)
            for key in a
            if key != "step"
        ]
        largest = max(abs(a - b) / abs(a) for a, b in pairs)
        tensors = sum(new["tensors"].get(key) != value for key, value in old["tensors"].items())
        print(f"{name}: largest relative difference {largest:.2e}, {tensors} of {len(old['tensors'])} tensors differ")
    print(f"{len(before.keys() & after.keys()) - different} settings identical to the last bit, {different} different")
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("output", type=Path)
    recording.add_argument("--repo", type=Path, default=Path(__file__).parent.parent)
    recording.add_argument("--only", default="")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        record(options.repo.resolve(), options.output, options.only)
    else:
        sys.exit(min(1, compare(json.loads(options.before.read_text()), json.loads(options.after.read_text()))))


if __name__ == "__main__":
    main()
