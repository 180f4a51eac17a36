"""`python -m distgpt.data PATH`: check every token of a token file and show its contents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distgpt.data.dataset import num_windows
from distgpt.data.token_files import open_token_file
from distgpt.data.tokenizer import load_tokenizer
from distgpt.errors import ArgumentParser, ConfigError, DataError, exit_process, path_argument, run_command

PREVIEW_TOKENS = 24


def main(arguments: Sequence[str]) -> None:
    """Check every token of a file and show its contents."""
    parser = ArgumentParser(prog="python -m distgpt.data", description=main.__doc__)
    parser.add_argument(
        "path",
        type=path_argument,
        metavar="PATH",
        help=".npz file with arrays train and val, .npy file, or nanoGPT's .bin file or folder",
    )
    parser.add_argument("--tokenizer", default="gpt2", help="encoding of the tokens (default gpt2)")
    parser.add_argument("--seq-len", type=int, default=128, help="window length to count windows for (default 128)")
    options = parser.parse_args(arguments)
    if options.seq_len < 1:
        raise ConfigError(f"command line: --seq-len: got {options.seq_len}, expected at least 1")
    tokenizer = load_tokenizer(options.tokenizer)
    arrays = open_token_file(Path(options.path))
    if not arrays:
        raise DataError(f"{options.path}: holds no arrays, expected train and val; make it with numpy.savez")
    for name, tokens in arrays.items():
        tokens.check_ids(tokenizer.n_vocab)
        tokens.check_crc()
        print(f"{name}: {len(tokens):,} tokens ({tokens.dtype}), {num_windows(len(tokens), options.seq_len):,} windows")
        preview = tokenizer.decode(tokens.read(0, min(len(tokens), PREVIEW_TOKENS), tokenizer.n_vocab).tolist())
        print(f"  begins {preview!r}")


if __name__ == "__main__":
    exit_process(run_command(main))
