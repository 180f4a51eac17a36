"""A row of a batch is what it would be alone; sampling follows its probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distgpt.errors import ConfigError, DataError
from distgpt.generate import (
    Sampling,
    encode_prompts,
    generate,
    generators_of,
    next_token_probabilities,
    parse,
    read_prefixes,
)
from distgpt.model import DecoderLM
from distgpt.tokenizer import load_tokenizer
from tests.test_model import N_VOCAB, model

PROMPTS = [[1], [5, 6, 7, 8, 9, 10, 11], [3, 4, 3], [7] * 19, [1]]
END = N_VOCAB - 1


def greedy_by_hand(m: DecoderLM, prompt: list[int], n: int) -> list[int]:
    """Without cache, batch or mask: read everything again for each token."""
    ids = list(prompt)
    for _ in range(n):
        if len(ids) >= m.n_positions:
            break
        token = int(m(torch.tensor([ids]))[0, -1].argmax())
        if token == END:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_greedy_in_a_batch_is_greedy_by_hand() -> None:
    m = model().eval()
    new, _ = generate(m, PROMPTS, END, 30, Sampling(temperature=0), generators_of(PROMPTS, 0))
    assert new == [greedy_by_hand(m, prompt, 30) for prompt in PROMPTS]
    assert [len(prompt) + len(row) for prompt, row in zip(PROMPTS, new, strict=True)] == [20] * 5  # n_positions


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=5, seed=3), Sampling(2.0, top_k=1)])
def test_sampling_in_a_batch_is_sampling_alone(sampling: Sampling) -> None:
    m = model().eval()
    generators = generators_of(PROMPTS, sampling.seed)
    together, losses = generate(m, PROMPTS, END, 12, sampling, generators)
    for row, prompt in enumerate(PROMPTS[:4]):  # the fifth repeats the first: alone, it would be the first
        alone, loss = generate(m, [prompt], END, 12, sampling, generators_of([prompt], sampling.seed))
        assert alone[0] == together[row]
        assert loss[0] == pytest.approx(losses[row], rel=1e-5, abs=1e-5)


def test_a_prompt_given_twice_gets_two_samples() -> None:
    m = model().eval()
    new, _ = generate(m, [[1, 2]] * 2, END, 10, Sampling(1.0), generators_of([[1, 2]] * 2, 0))
    assert new[0] != new[1]


def test_prompt_losses_are_the_models() -> None:
    m = model().eval()
    _, losses = generate(m, PROMPTS, END, 1, Sampling(0), generators_of(PROMPTS, 0))
    for prompt, loss in zip(PROMPTS, losses, strict=True):
        logits = m(torch.tensor([prompt]))[0, :-1]
        expected = F.cross_entropy(logits, torch.tensor(prompt[1:]), reduction="sum") if len(prompt) > 1 else 0.0
        assert loss == pytest.approx(float(torch.as_tensor(expected).detach()), rel=1e-5)


def test_end_of_text_ends_a_row_and_is_not_part_of_it() -> None:
    m = model().eval()
    unlimited = greedy_by_hand(m, PROMPTS[2], 12)
    other = next(token for token in unlimited if token != unlimited[0])
    new, _ = generate(m, PROMPTS, other, 12, Sampling(0), generators_of(PROMPTS, 0))
    assert unlimited.index(other) > 0 and new[2] == unlimited[: unlimited.index(other)]


def test_tokens_are_drawn_by_their_probabilities() -> None:
    probabilities = next_token_probabilities(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), 1.0, top_k=3)[0]
    assert probabilities[3] == 0
    expected = np.exp([2.0, 1.0, 0.0]) / np.exp([2.0, 1.0, 0.0]).sum()
    np.testing.assert_allclose(probabilities[:3], expected, rtol=1e-6)


def test_prefixes_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prefix": "a"}\n\n{"prefix": "\u00e9", "other": 1}\n')
    assert read_prefixes(path) == ["a", "\u00e9"]
    for bad in ("nonsense", '{"prefix": 3}', '{"text": "a"}', "[1]", "3"):
        path.write_text('{"prefix": "a"}\n' + bad + "\n")
        with pytest.raises(DataError, match=r"p\.jsonl:2: got"):
            read_prefixes(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="has no lines"):
        read_prefixes(path)


def test_prompts_that_do_not_fit_are_refused_and_empty_ones_begin_a_document() -> None:
    tokenizer = load_tokenizer("bytes")
    assert encode_prompts(["", "ab"], tokenizer, 4, False) == [[256], [97, 98]]
    with pytest.raises(ConfigError, match="has 4 tokens, expected at most 3"):
        encode_prompts(["abcd"], tokenizer, 4, False)


@pytest.mark.parametrize(
    "option",
    ["--temperature=-1", "--temperature=nan", "--top-k=0", "--max-new-tokens=0", "--seed=-1", "--batch-size=0"],
)
def test_numbers_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option.split('=', maxsplit=1)[0]}: got"):
        parse(["run", "--prompt", "x", option])


def test_rows_are_written_as_json_lines(tmp_path: Path) -> None:
    row = {"prefix": "\u00e9", "generation": "x"}
    (tmp_path / "g.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prefixes(tmp_path / "g.jsonl") == ["\u00e9"]  # what generate writes, it can read
