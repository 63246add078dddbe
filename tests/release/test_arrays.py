"""Arrays in files: what was written is read, and what is another file is refused."""

from pathlib import Path

import numpy as np
import pytest

from namr.errors import ManifestError
from namr.release import arrays


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.int64), np.ones((2, 3), np.float16), np.empty(0)])
def test_an_array_comes_back_decoded_and_mapped(tmp_path: Path, array: np.ndarray) -> None:
    data = arrays.encode_array(array)
    np.testing.assert_array_equal(arrays.decode_array(data, array.dtype), array)
    (tmp_path / "a.npy").write_bytes(data)
    mapped = arrays.map_array(tmp_path / "a.npy", array.dtype, [None, *array.shape[1:]])
    np.testing.assert_array_equal(mapped, array)


def test_what_is_written_to_a_mapped_array_stays_in_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(4))
    arrays.map_array(tmp_path / "a.npy", np.float64, [4])[:] = 1
    assert np.load(tmp_path / "a.npy").tolist() == [0] * 4


def test_bytes_that_are_no_array_of_the_type_are_refused() -> None:
    with pytest.raises(ManifestError, match=r"not a \.npy file \(5 bytes\)"):
        arrays.decode_array(b"wrong", np.int64)
    with pytest.raises(ManifestError, match=r"expected a \.npy file of int64, got float64"):
        arrays.decode_array(arrays.encode_array(np.ones(2)), np.int64)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.zeros((3, 4), np.float32), r"holds \(3, 4\) float32; expected \(any, 4\) float16"),
        (np.zeros((3, 5), np.float16), r"holds \(3, 5\) float16; expected \(any, 4\) float16"),
        (np.zeros(12, np.float16), r"holds \(12,\) float16"),
        (np.zeros((3, 4), np.float16, order="F"), "expected"),
    ],
)
def test_an_array_of_another_type_or_shape_is_refused(
    tmp_path: Path, stored: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "a.npy", stored)
    with pytest.raises(ManifestError, match=message):
        arrays.map_array(tmp_path / "a.npy", np.float16, [None, 4])


def test_a_file_of_another_length_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "a.npy", arrays.encode_array(np.zeros((3, 4), np.float16))
    path.write_bytes(data + b"xx")
    with pytest.raises(ManifestError, match=f"{path} has 154 bytes; its header says 152"):
        arrays.map_array(path, np.float16, [None, 4])
    for cut in (data[:-2], data[:100], b"", b"no numpy file"):
        path.write_bytes(cut)
        with pytest.raises(ManifestError, match=rf"{path} is no whole \.npy file"):
            arrays.map_array(path, np.float16, [None, 4])
