"""Token files of every format: any range is read as it was written, and invalid or damaged files are refused."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from distgpt.data.numpy_files import write_npz
from distgpt.data.token_array import SCAN_TOKENS
from distgpt.data.token_files import FORMATS, TokenArray, TokenFormat, find_format, open_token_file, smallest_dtype
from distgpt.errors import DataError
from tests.conftest import Run, read_metrics, training_curve

IDS = np.random.default_rng(0).integers(0, 200, 5000)
DTYPES = ["uint8", "int16", "uint16", ">u2", "int32", "uint32", ">i4", "int64", "uint64"]
RANGES = [(0, 5000), (0, 1), (4999, 5000), (1234, 2345), (7, 7)]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranges_of_every_integer_dtype_are_read(tmp_path: Path, save: object, dtype: str) -> None:
    path = tmp_path / "t.npz"
    save(path, train=IDS.astype(dtype), val=IDS[:10].astype(dtype))  # type: ignore[operator]
    arrays = open_token_file(path)
    assert set(arrays) == {"train", "val"}
    for start, stop in RANGES:
        np.testing.assert_array_equal(arrays["train"].read(start, stop, 200), IDS[start:stop])
    np.testing.assert_array_equal(arrays["val"].read(0, 10, 200), IDS[:10])


def test_compressed_npz_is_unpacked_once(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez_compressed(path, train=IDS)
    first = open_token_file(path)["train"]
    mtime = first.path.stat().st_mtime_ns
    second = open_token_file(path)["train"]
    assert (second.path, second.path.stat().st_mtime_ns, second.fingerprint) == (first.path, mtime, first.fingerprint)


def test_npy_file_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", IDS.astype(np.uint16))
    np.testing.assert_array_equal(open_token_file(tmp_path / "t.npy")["tokens"].read(0, 5000, 200), IDS)


@pytest.mark.parametrize("index", [0, 4999, 1717])
@pytest.mark.parametrize("token_id", [200, 60_000, -1])
def test_id_outside_the_vocabulary_is_refused_at_any_index(tmp_path: Path, index: int, token_id: int) -> None:
    ids = IDS.copy()
    ids[index] = token_id
    np.savez(tmp_path / "t.npz", train=ids)
    train = open_token_file(tmp_path / "t.npz")["train"]
    with pytest.raises(DataError, match=rf"train\[{index}\] is token {token_id}, expected 0 to 199"):
        train.check_ids(200)
    with pytest.raises(DataError, match=rf"train\[{index}\]"):
        train.read(max(0, index - 3), min(5000, index + 3), 200)


def test_check_ids_samples_a_long_array_where_a_limit_is_given(tmp_path: Path) -> None:
    ids = np.zeros(3 * SCAN_TOKENS, dtype=np.uint8)
    ids[-1] = 9
    np.savez(tmp_path / "t.npz", train=ids)
    train = open_token_file(tmp_path / "t.npz")["train"]
    train.check_ids(9, limit=SCAN_TOKENS)
    with pytest.raises(DataError):
        train.check_ids(9)


@pytest.mark.parametrize("stop", [0, 3, 40, 150, 5000, 9990, -1, -30])
def test_truncated_npz_is_refused(tmp_path: Path, stop: int) -> None:
    complete = tmp_path / "t.npz"
    np.savez(complete, train=IDS.astype(np.uint16))
    truncated = tmp_path / "cut.npz"
    truncated.write_bytes(complete.read_bytes()[:stop])
    with pytest.raises(DataError, match=r"cut\.npz"):
        open_token_file(truncated)


def test_file_truncated_while_open_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, train=IDS)
    train = open_token_file(path)["train"]
    os.truncate(path, 9000)
    with pytest.raises(DataError, match="ends at byte 9000"):
        train.read(4000, 4100, 200)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([1.0, 2.0]), "array of float64"),
        (np.array([[1, 2], [3, 4]]), r"shape \(2, 2\)"),
        (np.array(["a"]), "expected one dimension of integers"),
        (np.array([True]), "array of bool"),
        (np.array(7), r"shape \(\)"),
    ],
)
def test_array_that_is_not_one_dimension_of_integers_is_refused(
    tmp_path: Path, array: np.ndarray, expected: str
) -> None:
    np.savez(tmp_path / "t.npz", train=array)
    with pytest.raises(DataError, match=expected):
        open_token_file(tmp_path / "t.npz")


def test_pickle_inside_is_never_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(canary),)

    np.savez(tmp_path / "t.npz", train=np.array([Payload()], dtype=object))
    with pytest.raises(DataError, match="never loaded"):
        open_token_file(tmp_path / "t.npz")
    assert not canary.exists()


def test_header_with_a_false_length_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (2**60,)})
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("train.npy", header.getvalue() + b"\0" * 100)
    with pytest.raises(DataError, match="cut short"):
        open_token_file(tmp_path / "t.npz")


def test_flipped_byte_in_a_compressed_npz_is_detected(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "t.npz", train=IDS.astype(np.uint16))
    raw = bytearray((tmp_path / "t.npz").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    (tmp_path / "t.npz").write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        open_token_file(tmp_path / "t.npz")
    assert not list(tmp_path.glob("**/*.npy"))


def test_write_npz_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.npz"
    write_npz(path, {"train": IDS.astype(np.uint16)})
    np.testing.assert_array_equal(open_token_file(path)["train"].read(0, 5000, 200), IDS)
    with pytest.raises(TypeError):
        write_npz(path.with_name("bad.npz"), {"file": IDS})  # a name that numpy.savez cannot take
    assert [p.name for p in path.parent.iterdir()] == ["t.npz"]


@pytest.mark.parametrize(("n_vocab", "dtype"), [(257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_smallest_dtype_holds_the_largest_id(n_vocab: int, dtype: type) -> None:
    assert smallest_dtype(n_vocab) == dtype
    assert np.array([n_vocab - 1]).astype(smallest_dtype(n_vocab))[0] == n_vocab - 1


def test_flipped_byte_that_gives_a_valid_id_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, train=IDS.astype(np.uint16))
    open_token_file(path)["train"].check_crc()
    raw = bytearray(path.read_bytes())
    for index in np.random.default_rng(1).integers(200, 9000, 20):
        raw[index] ^= 1
        path.write_bytes(raw)
        with pytest.raises(DataError, match="has checksum"):
            open_token_file(path)["train"].check_crc()
        raw[index] ^= 1


def check_all(path: Path) -> None:
    """Open a token file and check every array completely."""
    for array in open_token_file(path).values():
        array.check_ids(200)
        array.check_crc()


@pytest.mark.parametrize("seed", range(300))
def test_random_damage_raises_data_error_or_nothing(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    np.savez(tmp_path / "t.npz", train=IDS[:50].astype(np.uint16))
    raw = bytearray((tmp_path / "t.npz").read_bytes())
    for index in generator.integers(0, len(raw), 3):
        raw[index] = generator.integers(256)
    (tmp_path / "t.npz").write_bytes(raw)
    try:
        check_all(tmp_path / "t.npz")
    except DataError:
        pass


def test_folder_without_token_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got a folder without train\.bin or val\.bin, expected \.npz with arrays"):
        open_token_file(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"\x93NUMP", b"PK", b"some text, longer than what is read to find a format"])
def test_file_of_unknown_format_is_refused_with_its_size_and_the_formats(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "t").write_bytes(raw)
    assert find_format(tmp_path / "t") is None
    with pytest.raises(DataError, match=rf"t: got {len(raw)} bytes in an unknown format, expected") as error:
        open_token_file(tmp_path / "t")
    assert all(token_format.name in str(error.value) for token_format in FORMATS)


def test_pipe_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.npz")  # opening it would wait for a writer
    with pytest.raises(DataError, match="got a device or pipe"):
        open_token_file(tmp_path / "t.npz")


def test_a_format_added_to_the_table_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_text(path: Path) -> dict[str, TokenArray]:
        np.save(tmp_path / "numbers.npy", np.array([int(number) for number in path.read_text().split()]))
        return open_token_file(tmp_path / "numbers.npy")

    new_format = TokenFormat("numbers in a .txt", lambda path, head: path.suffix == ".txt", open_text)
    monkeypatch.setattr("distgpt.data.token_files.FORMATS", (*FORMATS, new_format))
    (tmp_path / "t.txt").write_text("3 1 2")
    assert open_token_file(tmp_path / "t.txt")["tokens"].read(0, 3, 9).tolist() == [3, 1, 2]
    with pytest.raises(DataError, match=r"numbers in a \.txt"):
        open_token_file(tmp_path)


@pytest.fixture
def train(tmp_path: Path) -> TokenArray:
    np.savez(tmp_path / "t.npz", train=IDS.astype(np.uint16))
    return open_token_file(tmp_path / "t.npz")["train"]


@pytest.mark.parametrize("method", ["read", "check_crc"])
@pytest.mark.parametrize("num_failures", [1, 3, 4])
def test_failed_read_is_retried_three_times_with_growing_pauses(
    train: TokenArray, monkeypatch: pytest.MonkeyPatch, method: str, num_failures: int
) -> None:
    pauses: list[float] = []
    errors = [OSError(errno.EIO, "Input/output error") for _ in range(num_failures)]
    pread = os.pread

    def failing_pread(fd: int, num_bytes: int, position: int) -> bytes:
        if errors:
            raise errors.pop()
        return pread(fd, num_bytes, position)

    monkeypatch.setattr(os, "pread", failing_pread)
    monkeypatch.setattr(time, "sleep", pauses.append)
    action = train.check_crc if method == "check_crc" else lambda: train.read(0, 5000, 200)
    if num_failures < 4:
        action()
    else:
        with pytest.raises(DataError, match=r"t\.npz: cannot read at byte \d+: Input/output error, 4 times; fix the"):
            action()
    assert pauses == [0.1, 1.0, 3.0][:num_failures]


def test_short_read_is_completed(train: TokenArray, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, num_bytes, position: pread(fd, min(num_bytes, 777), position))
    np.testing.assert_array_equal(train.read(0, 5000, 200), IDS)
    train.check_crc()


@pytest.mark.parametrize("n_vocab", [65_535, 65_536, 65_537])
def test_every_id_of_a_vocabulary_around_16_bits_is_preserved(tmp_path: Path, n_vocab: int) -> None:
    write_npz(tmp_path / "t.npz", {"train": np.arange(n_vocab, dtype=smallest_dtype(n_vocab))})
    np.testing.assert_array_equal(
        open_token_file(tmp_path / "t.npz")["train"].read(0, n_vocab, n_vocab), np.arange(n_vocab)
    )


def zipped(path: Path, name: str, content: bytes, compression: int = zipfile.ZIP_STORED, size: int = 0) -> Path:
    """An .npz with one member. If `size` is given, the archive's directory claims that size for it."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(zipfile.ZipInfo(name), content, compression)
        archive.filelist[0].file_size = size or len(content)
    return path


def npy(dtype: str = "<u2", shape: str = "(9,)", version: bytes = b"\1\0", header_bytes: int | None = None) -> bytes:
    """An .npy file with 18 bytes of content, whatever its header claims."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version == b"\1\0" else "<I", header_bytes or len(header))
    return b"\x93NUMPY" + version + size + header + bytes(18)


@pytest.mark.parametrize("size", [10**6, 2**32, 2**62])
def test_member_that_claims_to_be_larger_than_its_file_is_refused(tmp_path: Path, size: int) -> None:
    path = zipped(tmp_path / "t.npz", "train.npy", npy(), size=size)
    with pytest.raises(DataError, match=rf"'train\.npy' claims {size:,} bytes"):
        open_token_file(path)


def test_compressed_member_larger_than_the_disk_is_not_unpacked(tmp_path: Path) -> None:
    path = zipped(tmp_path / "t.npz", "train.npy", npy(), zipfile.ZIP_DEFLATED, size=2**62)
    with pytest.raises(DataError, match=r"needs 4,611,686,018,427,387,904 bytes unpacked"):
        open_token_file(path)
    assert not list(tmp_path.glob("**/*.npy"))


@pytest.mark.parametrize(
    "content",
    [
        npy(shape=f"({2**63},)"),
        npy(shape=f"({2**64 + 1},)"),
        npy(shape=f"({2**200},)"),
        npy(shape=f"({2**32}, {2**32})"),
        npy(dtype="<u99999999999"),
        npy(dtype=f"V{2**31 - 1}"),
        npy(version=b"\2\0", header_bytes=2**32 - 1),
        npy(version=b"\2\0", shape="(" + "(" * 90_000),
    ],
)
def test_sizes_in_a_header_are_checked_against_the_file_before_allocating(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.npy").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"^[^\n]*t\.npy[^\n]*$"):
            open_token_file(tmp_path / "t.npy")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "name",
    [
        "../../outside.npy",
        "/outside.npy",
        "..npy",
        "...npy",
        "../..",
        "a/../../../outside",
        "\\..\\outside.npy",
        "C:outside.npy",
        "x" * 300 + ".npy",
        "new\nline.npy",
        "\x1b[2J.npy",
        "outside.npy/",
        ".npy",
    ],
)
def test_member_name_never_leads_out_of_the_folder(tmp_path: Path, name: str, compression: int) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = zipped(folder / "t.npz", name, npy(), compression)
    try:
        for array in open_token_file(path).values():
            assert array.path == path or array.path.parent == folder / "t.npz.unpacked"
            assert array.name.isprintable()
            array.check_ids(200)
    except DataError as error:
        assert "\n" not in str(error)
    outside = [file for file in tmp_path.rglob("*") if file.is_file() and folder not in file.parents]
    assert not outside and not Path("/outside.npy").exists()


def nanogpt_folder(folder: Path, **splits: np.ndarray) -> Path:
    """A folder with the given splits as nanoGPT writes them."""
    folder.mkdir()
    for split, ids in splits.items():
        ids.astype("<u2").tofile(folder / f"{split}.bin")
    return folder


def test_all_formats_give_equal_reads_of_equal_tokens(tmp_path: Path) -> None:
    ids = np.random.default_rng(2).integers(0, 2**16, 5000)
    np.savez(tmp_path / "stored.npz", train=ids, val=ids[:10])
    np.savez_compressed(tmp_path / "compressed.npz", train=ids, val=ids[:10])
    np.save(tmp_path / "t.npy", ids.astype(np.uint16))
    folder = nanogpt_folder(tmp_path / "folder", train=ids, val=ids[:10])
    splits = [open_token_file(path) for path in (tmp_path / "stored.npz", tmp_path / "compressed.npz", folder)]
    single = [open_token_file(path) for path in (tmp_path / "t.npy", folder / "train.bin")]
    assert [set(arrays) for arrays in splits] == [{"train", "val"}] * 3
    assert [set(arrays) for arrays in single] == [{"tokens"}] * 2
    for array in [*(arrays["train"] for arrays in splits), *(arrays["tokens"] for arrays in single)]:
        assert len(array) == 5000
        array.check_ids(2**16)
        array.check_crc()
        for start, stop in RANGES:
            np.testing.assert_array_equal(array.read(start, stop, 2**16), ids[start:stop])
        with pytest.raises(DataError, match=rf"{array.name}\[\d+\] is token {ids.max()}, expected 0 to"):
            array.check_ids(int(ids.max()))
    for arrays in splits:
        np.testing.assert_array_equal(arrays["val"].read(0, 10, 2**16), ids[:10])


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "t.bin: got 0 bytes, expected uint16 tokens without a header"),
        (bytes(41), "t.bin: got 41 bytes, expected uint16 tokens without a header: an even number of bytes"),
        (np.array([20240520, 1, 9], dtype="<i4").tobytes(), "t.bin: begins with llm.c's header (magic 20240520)"),
        (np.array([20240801, 7, 9], dtype="<i4").tobytes(), "t.bin: begins with llm.c's header (magic 20240801)"),
    ],
)
def test_bin_file_that_is_not_nanogpts_is_refused(tmp_path: Path, raw: bytes, expected: str) -> None:
    (tmp_path / "t.bin").write_bytes(raw)
    with pytest.raises(DataError) as error:
        open_token_file(tmp_path / "t.bin")
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_folder_without_one_of_its_splits_is_refused(tmp_path: Path, missing: str) -> None:
    folder = nanogpt_folder(tmp_path / "folder", train=IDS, val=IDS)
    (folder / f"{missing}.bin").unlink()
    with pytest.raises(DataError, match=rf"folder: has no file {missing}\.bin, expected train\.bin and val\.bin"):
        open_token_file(folder)
    (folder / f"{missing}.bin").mkdir()
    with pytest.raises(DataError, match=rf"folder: has no file {missing}\.bin"):
        open_token_file(folder)


def test_fingerprint_of_a_bin_file_depends_on_size_and_last_mebibyte(tmp_path: Path) -> None:
    ids = np.zeros(2**20, dtype=np.uint16)  # 2 MiB
    fingerprints = []
    for index, length in [(0, 2**20), (2**19, 2**20), (2**20 - 1, 2**20), (0, 2**20 - 1)]:
        changed = ids.copy()
        changed[index] = 1
        changed[:length].tofile(tmp_path / "t.bin")
        fingerprints.append(open_token_file(tmp_path / "t.bin")["tokens"].fingerprint)
    assert len(set(fingerprints)) == 4
    ids.tofile(tmp_path / "t.bin")
    assert open_token_file(tmp_path / "t.bin")["tokens"].fingerprint == fingerprints[0]  # the first MiB is not covered


def test_training_and_evaluating_on_a_nanogpt_folder_give_the_results_of_the_same_tokens_in_an_npz(
    run: Run, config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    arrays = np.load(corpus)
    folder = nanogpt_folder(tmp_path / "tokens", train=arrays["train"], val=arrays["val"])
    for name, data in (("npz", corpus), ("bin", folder)):
        done = run("train", config_file, f"output_dir={tmp_path / name}", f"data={data}", "num_training_steps=3")
        assert done.returncode == 0, done.stderr
    assert len(training_curve(tmp_path / "bin")) == 3
    assert training_curve(tmp_path / "bin") == training_curve(tmp_path / "npz")
    scores = [[r["val-loss"] for r in read_metrics(tmp_path / n) if "val-loss" in r] for n in ("bin", "npz")]
    assert scores[0] and scores[0] == scores[1]
    done = run("evaluate", tmp_path / "bin", "--data", folder)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads(done.stdout)
    assert evaluation["data"] == f"{folder} (val)"
    assert evaluation["val-loss"] == pytest.approx(scores[0][-1], rel=1e-6)


def test_data_command_shows_the_contents_of_a_file(run: Run, corpus: Path) -> None:
    done = run("data", corpus, "--tokenizer", "bytes")
    assert done.returncode == 0, done.stderr
    assert "val: 1,003 tokens (uint16), 7 windows" in done.stdout


def test_data_command_shows_the_contents_of_a_nanogpt_folder(run: Run, tmp_path: Path) -> None:
    ids = np.frombuffer(b"To be, or not to be", dtype=np.uint8)
    nanogpt_folder(tmp_path / "tokens", train=ids, val=ids[:6])
    done = run("data", "tokens", "--tokenizer", "bytes", "--seq-len", "4")
    assert done.returncode == 0, done.stderr
    assert "train: 19 tokens (uint16), 4 windows\n  begins 'To be, or not to be'" in done.stdout
    assert "val: 6 tokens (uint16), 1 windows\n  begins 'To be,'" in done.stdout


def test_data_command_refuses_ids_outside_the_vocabulary(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", train=np.array([1, 2, 60_000]))
    done = run("data", "t.npz")
    assert done.returncode == 3
    assert done.stderr == (
        "distgpt: error: t.npz: train[2] is token 60000, expected 0 to 50256 (the tokenizer's vocabulary); "
        "check tokenizer_encoding or create the tokens again\n"
    )
