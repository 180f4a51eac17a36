"""Token files: any stretch is read as it was written, and nothing unsound is read at all."""

from __future__ import annotations

import errno
import io
import os
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from distgpt.errors import DataError
from distgpt.shards import SCAN_TOKENS, TokenArray, open_tokens, smallest_dtype, write_npz

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


@pytest.fixture
def train(tmp_path: Path) -> TokenArray:
    np.savez(tmp_path / "t.npz", train=IDS.astype(np.uint16))
    return open_tokens(tmp_path / "t.npz")["train"]


@pytest.mark.parametrize("use", ["read", "verify"])
@pytest.mark.parametrize("failures", [1, 3, 4])
def test_what_cannot_be_read_is_asked_for_four_times_with_growing_pauses(
    train: TokenArray, monkeypatch: pytest.MonkeyPatch, use: str, failures: int
) -> None:
    pauses: list[float] = []
    errors = [OSError(errno.EIO, "Input/output error") for _ in range(failures)]
    pread = os.pread

    def failing(*place: int) -> bytes:
        if errors:
            raise errors.pop()
        return pread(*place)

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(time, "sleep", pauses.append)
    action = train.verify if use == "verify" else lambda: train.read(0, 5000, 200)
    if failures < 4:
        action()
    else:
        with pytest.raises(DataError, match=r"t\.npz: cannot read at byte \d+: Input/output error, 4 times; mend the"):
            action()
    assert pauses == [0.1, 1.0, 3.0][:failures]


def test_a_read_that_the_system_cuts_short_is_completed(train: TokenArray, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, position: pread(file, min(size, 777), position))
    np.testing.assert_array_equal(train.read(0, 5000, 200), IDS)
    train.verify()


@pytest.mark.parametrize("n_vocab", [65_535, 65_536, 65_537])
def test_every_id_of_a_vocabulary_at_the_edge_of_16_bits_comes_back(tmp_path: Path, n_vocab: int) -> None:
    write_npz(tmp_path / "t.npz", {"train": np.arange(n_vocab, dtype=smallest_dtype(n_vocab))})
    np.testing.assert_array_equal(
        open_tokens(tmp_path / "t.npz")["train"].read(0, n_vocab, n_vocab), np.arange(n_vocab)
    )


def zipped(path: Path, name: str, content: bytes, compression: int = zipfile.ZIP_STORED, size: int = 0) -> Path:
    """A .npz of one member; with `size`, its directory lies about how large that is."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(zipfile.ZipInfo(name), content, compression)
        archive.filelist[0].file_size = size or len(content)
    return path


def npy(dtype: str = "<u2", shape: str = "(9,)", version: bytes = b"\1\0", header_bytes: int | None = None) -> bytes:
    """An array file that says of itself what it likes, with 18 bytes of content."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version == b"\1\0" else "<I", header_bytes or len(header))
    return b"\x93NUMPY" + version + size + header + bytes(18)


@pytest.mark.parametrize("size", [10**6, 2**32, 2**62])
def test_a_member_that_is_said_to_be_larger_than_its_file_is_refused(tmp_path: Path, size: int) -> None:
    path = zipped(tmp_path / "t.npz", "train.npy", npy(), size=size)
    with pytest.raises(DataError, match=rf"'train\.npy' is said to have {size:,} bytes"):
        open_tokens(path)


def test_a_compressed_member_larger_than_the_disk_is_not_unpacked(tmp_path: Path) -> None:
    path = zipped(tmp_path / "t.npz", "train.npy", npy(), zipfile.ZIP_DEFLATED, size=2**62)
    with pytest.raises(DataError, match=r"needs 4,611,686,018,427,387,904 bytes unpacked"):
        open_tokens(path)
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
def test_sizes_in_a_header_are_compared_with_the_file_before_memory_is_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.npy").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"^[^\n]*t\.npy[^\n]*$"):
            open_tokens(tmp_path / "t.npy")
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
def test_a_members_name_never_leads_out_of_its_folder(tmp_path: Path, name: str, compression: int) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = zipped(folder / "t.npz", name, npy(), compression)
    try:
        for array in open_tokens(path).values():
            assert array.path == path or array.path.parent == folder / "t.npz.unpacked"
            assert array.name.isprintable()
            array.check(200)
    except DataError as error:
        assert "\n" not in str(error)
    outside = [found for found in tmp_path.rglob("*") if found.is_file() and folder not in found.parents]
    assert not outside and not Path("/outside.npy").exists()
