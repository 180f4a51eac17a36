"""A result is the mean over every token once, for any ranks and batches, and so is the command's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distgpt import train
from distgpt.checkpoint.weights import load_model
from distgpt.evaluate import EVALUATIONS, EvalInputs
from tests.conftest import Run, read_metrics
from tests.ranks import SEQ_LEN, results, small_model, strategies, stream


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_result_does_not_depend_on_ranks_or_batch(ranks: int, tmp_path: Path) -> None:
    model = small_model(257)
    tokens = torch.from_numpy(stream(tmp_path, 1003, 257).read(0, 1003, 257))
    total = 0.0
    with torch.no_grad():
        for start in range(0, 1002, SEQ_LEN):
            window = tokens[start : start + SEQ_LEN + 1]
            total += float(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum"))
    by_rank, _ = results(ranks)
    assert len(by_rank["evaluation"][0]) == len(strategies(ranks))
    for evaluation in (evaluation for row in by_rank["evaluation"] for evaluation in row.values()):
        for score in evaluation["scores"]:
            assert score["tokens"] == 1002
            assert score["val-loss"] == pytest.approx(total / 1002, rel=1e-6)
            assert score["val-perplexity"] == pytest.approx(math.exp(total / 1002), rel=1e-5)
        assert evaluation["limited"] == 100
        assert evaluation["training"]  # the mode is restored


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished run."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("finished")
    (folder / "c.yaml").write_text(TINY.format(folder=folder, corpus=corpus))
    train.main([str(folder / "c.yaml"), "precision=fp32", "compile=off", "num_training_steps=30"])
    return folder / "run"


def test_the_command_repeats_the_runs_own_result(finished: Path, run: Run) -> None:
    done = run("evaluate", finished)
    assert done.returncode == 0, done.stderr
    result, saved = json.loads(done.stdout), json.loads((finished / "eval.json").read_text())
    assert result["tokens"] == saved["tokens"] == 1002
    assert result["val-loss"] == pytest.approx(saved["val-loss"], rel=1e-6)


def test_text_and_token_files_give_the_same_result(finished: Path, run: Run, tmp_path: Path) -> None:
    text = "def main():\n    return 'caf\u00e9'\n" * 9
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    np.save(tmp_path / "t.npy", np.frombuffer(text.encode(), dtype=np.uint8))
    scores = [json.loads(run("evaluate", finished, "--data", name).stdout) for name in ("t.txt", "t.npy")]
    assert scores[0]["val-loss"] == scores[1]["val-loss"]
    assert scores[0]["tokens"] == len(text.encode()) - 1


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\xfe\x00", None])
def test_data_that_cannot_be_evaluated_is_refused(
    finished: Path, run: Run, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    done = run("evaluate", finished, "--data", "t")
    assert done.returncode == 3
    assert done.stderr.startswith("distgpt: error: t: ") and done.stderr.count("\n") == 1


def test_generate_continues_prefixes_and_prompts(finished: Path, run: Run, tmp_path: Path) -> None:
    prefixes = ["def main", "", "    return caf\u00e9"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prefix": p}) + "\n" for p in prefixes))
    done = run("generate", finished, "--prefixes", "p.jsonl", "--temperature", "0", "--max-new-tokens", "9")
    assert done.returncode == 0, done.stderr
    assert "perplexity of the prefixes: " in done.stderr
    rows = [json.loads(line) for line in (finished / "generation.jsonl").read_text().splitlines()]
    assert [row["prefix"] for row in rows] == prefixes
    prompted = run("generate", finished, "--prompt", "def main", "--temperature", "0", "--max-new-tokens", "9")
    assert prompted.stdout == f"def main{rows[0]['generation']}\n"
    model, tokenizer, _ = load_model(finished)
    ids = tokenizer.encode("def main")
    for _ in range(9):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids) == prompted.stdout[:-1]


def test_generate_refuses_invalid_input(finished: Path, run: Run, tmp_path: Path) -> None:
    cases = [
        ((tmp_path, "--prompt", "x"), 4, "holds no trained model"),
        ((finished, "--prompt", "x" * 40), 2, "has 40 tokens, expected at most 31"),
        ((finished, "--prefixes", "nowhere"), 3, "cannot read"),
        ((finished, "--prompt", "x", "--device", "tpu"), 2, "got 'tpu'"),
    ]
    for arguments, code, message in cases:
        done = run("generate", *arguments)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert message in done.stderr and done.stderr.count("\n") == 1


def test_every_evaluation_of_the_table_is_run_and_logged(
    finished: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation is one function and one entry."""

    def weight_norm(inputs: EvalInputs) -> dict[str, float]:
        return {"weight-norm": float(sum(p.detach().norm() ** 2 for p in inputs.model.parameters()) ** 0.5)}

    monkeypatch.setitem(EVALUATIONS, "weights", weight_norm)
    train.main([str(config_file), "precision=fp32", "compile=off"])
    rows = [row for row in read_metrics(tmp_path / "run") if "val-loss" in row]
    assert [row["step"] for row in rows if row.get("weight-norm", 0) > 0] == [5, 10, 12]
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert results["weight-norm"] == rows[-1]["weight-norm"]
