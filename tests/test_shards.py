"""Token files: any stretch is read as it was written, and nothing unsound is read at all."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from distgpt.errors import DataError
from distgpt.shards import SCAN_TOKENS, open_tokens, smallest_dtype, write_npz

IDS = np.random.default_rng(0).integers(0, 200, 5000)
DTYPES = ["uint8", "int16", "uint16", ">u2", "int32", "uint32", ">i4", "int64", "uint64"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_integer_array_is_read_by_stretches(tmp_path: Path, save: object, dtype: str) -> None:
    path = tmp_path / "t.npz"
    save(path, train=IDS.astype(dtype), val=IDS[:10].astype(dtype))  # type: ignore[operator]
    arrays = open_tokens(path)
    assert set(arrays) == {"train", "val"}
    for start, stop in [(0, 5000), (0, 1), (4999, 5000), (1234, 2345), (7, 7)]:
        np.testing.assert_array_equal(arrays["train"].read(start, stop, 200), IDS[start:stop])
    np.testing.assert_array_equal(arrays["val"].read(0, 10, 200), IDS[:10])


def test_a_compressed_file_is_unpacked_once(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez_compressed(path, train=IDS)
    first = open_tokens(path)["train"]
    stamp = first.path.stat().st_mtime_ns
    again = open_tokens(path)["train"]
    assert (again.path, again.path.stat().st_mtime_ns, again.fingerprint) == (first.path, stamp, first.fingerprint)


def test_an_npy_file_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", IDS.astype(np.uint16))
    np.testing.assert_array_equal(open_tokens(tmp_path / "t.npy")["tokens"].read(0, 5000, 200), IDS)


@pytest.mark.parametrize("where", [0, 4999, 1717])
@pytest.mark.parametrize("bad", [200, 60_000, -1])
def test_an_id_outside_the_vocabulary_is_found_wherever_it_is(tmp_path: Path, where: int, bad: int) -> None:
    ids = IDS.copy()
    ids[where] = bad
    np.savez(tmp_path / "t.npz", train=ids)
    train = open_tokens(tmp_path / "t.npz")["train"]
    with pytest.raises(DataError, match=rf"train\[{where}\] is token {bad}, expected 0 to 199"):
        train.check(200)
    with pytest.raises(DataError, match=rf"train\[{where}\]"):
        train.read(max(0, where - 3), min(5000, where + 3), 200)


def test_a_long_array_is_sampled_where_asked(tmp_path: Path) -> None:
    ids = np.zeros(3 * SCAN_TOKENS, dtype=np.uint8)
    ids[-1] = 9
    np.savez(tmp_path / "t.npz", train=ids)
    train = open_tokens(tmp_path / "t.npz")["train"]
    train.check(9, limit=SCAN_TOKENS)
    with pytest.raises(DataError):
        train.check(9)


@pytest.mark.parametrize("keep", [0, 3, 40, 150, 5000, 9990, -1, -30])
def test_a_file_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    whole = tmp_path / "t.npz"
    np.savez(whole, train=IDS.astype(np.uint16))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cut\.npz"):
        open_tokens(cut)


def test_a_file_cut_short_while_open_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, train=IDS)
    train = open_tokens(path)["train"]
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
def test_an_array_of_something_else_is_refused(tmp_path: Path, array: np.ndarray, expected: str) -> None:
    np.savez(tmp_path / "t.npz", train=array)
    with pytest.raises(DataError, match=expected):
        open_tokens(tmp_path / "t.npz")


def test_a_pickle_inside_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(canary),)

    np.savez(tmp_path / "t.npz", train=np.array([Payload()], dtype=object))
    with pytest.raises(DataError, match="never loaded"):
        open_tokens(tmp_path / "t.npz")
    assert not canary.exists()


def test_a_header_that_lies_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (2**60,)})
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("train.npy", header.getvalue() + b"\0" * 100)
    with pytest.raises(DataError, match="cut short"):
        open_tokens(tmp_path / "t.npz")


def test_a_flipped_byte_in_a_compressed_file_is_found(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "t.npz", train=IDS.astype(np.uint16))
    raw = bytearray((tmp_path / "t.npz").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    (tmp_path / "t.npz").write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        open_tokens(tmp_path / "t.npz")
    assert not list(tmp_path.glob("**/*.npy"))


def test_writing_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.npz"
    write_npz(path, {"train": IDS.astype(np.uint16)})
    np.testing.assert_array_equal(open_tokens(path)["train"].read(0, 5000, 200), IDS)
    with pytest.raises(TypeError):
        write_npz(path.with_name("bad.npz"), {"file": IDS})  # a name that numpy.savez cannot take
    assert [p.name for p in path.parent.iterdir()] == ["t.npz"]


@pytest.mark.parametrize(("n_vocab", "dtype"), [(257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_no_id_ever_wraps(n_vocab: int, dtype: type) -> None:
    assert smallest_dtype(n_vocab) == dtype
    assert np.array([n_vocab - 1]).astype(smallest_dtype(n_vocab))[0] == n_vocab - 1


def test_a_flipped_byte_inside_the_vocabulary_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, train=IDS.astype(np.uint16))
    open_tokens(path)["train"].verify()
    raw = bytearray(path.read_bytes())
    for where in np.random.default_rng(1).integers(200, 9000, 20):
        raw[where] ^= 1
        path.write_bytes(raw)
        with pytest.raises(DataError, match="has checksum"):
            open_tokens(path)["train"].verify()
        raw[where] ^= 1


@pytest.mark.parametrize("seed", range(300))
def test_any_damage_to_a_file_is_an_error_of_ours_or_none(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    np.savez(tmp_path / "t.npz", train=IDS[:50].astype(np.uint16))
    raw = bytearray((tmp_path / "t.npz").read_bytes())
    for where in generator.integers(0, len(raw), 3):
        raw[where] = generator.integers(256)
    (tmp_path / "t.npz").write_bytes(raw)
    try:
        for array in open_tokens(tmp_path / "t.npz").values():
            array.check(200)
            array.verify()
    except DataError:
        pass


def test_a_folder_is_no_token_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got a folder"):
        open_tokens(tmp_path)
