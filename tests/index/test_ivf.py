"""The laws of merging, for every index that is offered, and what a merge refuses."""

import importlib
import itertools
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from namr.errors import ConfigError, ManifestError, ShapeError
from namr.index import index_files, ivf

DIM = 32
KEYS = ["Flat", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8x8", "IVF4,PQ2x8", "IVF16,PQ16x4fs"]


def vectors(n: int, *, seed: int = 0, dim: int = DIM) -> ivf.Floats:
    x: ivf.Floats = np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)
    return x


GALLERY = vectors(1200)
IDS = np.arange(1200, dtype=np.int64) * 3 + (7 << 32)
QUERIES = vectors(40, seed=1)


@pytest.fixture(scope="module")
def templates() -> dict[str, ivf.Template]:
    return {key: ivf.train_template(GALLERY[::2], key, seed=3, num_threads=1) for key in KEYS}


def build(template: ivf.Template, folder: Path, bounds: list[int], ids: ivf.Ids = IDS) -> list[Path]:
    """Parts over GALLERY, cut at bounds."""
    paths = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        paths.append(folder / f"{number}.part")
        blocks = [(GALLERY[start:stop], ids[start:stop])]
        ivf.build_part(template, blocks, paths[-1], num_threads=1)
    return paths


def build_whole(template: ivf.Template, path: Path, x: ivf.Floats = GALLERY) -> ivf.IndexInfo:
    """One index over everything: what merged parts are compared with."""
    return ivf.build_part(template, [(x, IDS)], path, num_threads=1)


def found(path: Path | list[Path], *, nprobe: int = 5, k: int = 10) -> tuple[ivf.Floats, ivf.Ids]:
    return ivf.open_index(path).search(QUERIES, k, nprobe)


def assert_same(one: tuple[ivf.Floats, ivf.Ids], other: tuple[ivf.Floats, ivf.Ids]) -> None:
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize("key", KEYS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 1200), max_size=6))
def test_parts_merged_are_the_one_index(
    cuts: list[int], key: str, templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    template = templates[key]
    parts = build(template, tmp_path, sorted([0, *cuts, 1200]))
    merged = ivf.merge_parts(template, parts[::-1], tmp_path / "merged")
    whole = build_whole(template, tmp_path / "whole")
    assert merged == whole
    assert (merged.num_vectors, merged.first_id, merged.last_id) == (1200, IDS[0], IDS[-1])
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    assert_same(found(tmp_path / "merged"), found(tmp_path / "whole"))


@pytest.mark.parametrize("key", KEYS[1:])
def test_the_lists_of_several_segments_are_as_long_as_those_of_one(
    key: str, templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    build_whole(templates[key], tmp_path / "whole")
    parts = build(templates[key], tmp_path, [0, 500, 1200])
    one, several = ivf.open_index(tmp_path / "whole"), ivf.open_index(parts)
    sizes = one.list_sizes
    assert len(sizes) == one.num_lists and sizes.sum() == 1200 and (sizes == several.list_sizes).all()
    assert one.imbalance == pytest.approx(len(sizes) * np.square(sizes / 1200).sum())


@pytest.mark.parametrize("key", KEYS)
def test_merged_equals_what_faiss_builds_alone(
    key: str, templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    template = templates[key]
    ivf.merge_parts(template, build(template, tmp_path, [0, 1, 700, 700, 1200]), tmp_path / "merged")
    alone = faiss.deserialize_index(np.frombuffer(template.data, np.uint8))
    alone.add_with_ids(GALLERY, IDS)
    assert (tmp_path / "merged").read_bytes() == index_files.serialised(alone)
    plain = faiss.read_index(str(tmp_path / "merged"))
    if key.endswith("fs"):
        alone, plain = faiss.IndexIVFPQFastScan(alone), faiss.IndexIVFPQFastScan(plain)
    for index in (alone, plain):
        if key != "Flat":
            index.nprobe = 5
    distances, ids = alone.search(QUERIES, 10)
    assert_same((distances, ids), plain.search(QUERIES, 10))
    assert_same((distances, ids), found(tmp_path / "merged"))


@pytest.mark.parametrize("key", KEYS)
def test_segments_are_searched_as_one_index(
    key: str, templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    template = templates[key]
    parts = build(template, tmp_path, [0, 900, 900, 1150, 1200])
    base = ivf.merge_parts(template, parts[:2], tmp_path / "base")
    assert base.num_vectors == 900
    build_whole(template, tmp_path / "whole")
    several = ivf.open_index([tmp_path / "base", *parts[2:]])
    assert several.num_vectors == 1200
    assert_same(several.search(QUERIES, 10, 5), found(tmp_path / "whole"))
    ivf.merge_parts(template, [tmp_path / "base", *parts[2:]], tmp_path / "compacted")
    assert (tmp_path / "compacted").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("key", KEYS)
def test_ties_come_out_as_in_one_index(key: str, templates: dict[str, ivf.Template], tmp_path: Path) -> None:
    template = templates[key]
    copies = np.repeat(GALLERY[:30], 40, axis=0)
    parts = []
    for number, (start, stop) in enumerate(((0, 333), (333, 340), (340, 1200))):
        parts.append(tmp_path / str(number))
        ivf.build_part(template, [(copies[start:stop], IDS[start:stop])], parts[-1], num_threads=1)
    ivf.merge_parts(template, [parts[2], parts[0], parts[1]], tmp_path / "merged")
    build_whole(template, tmp_path / "whole", copies)
    assert_same(found(tmp_path / "merged"), found(tmp_path / "whole"))
    assert_same(found(parts), found(tmp_path / "whole"))


def on_borders(centroids: ivf.Floats, num: int, *, seed: int) -> ivf.Floats:
    """Points in the middle between two centroids."""
    one, other = np.random.default_rng(seed).integers(len(centroids), size=(2, num))
    middle: ivf.Floats = (centroids[one] + centroids[other]) / 2
    return middle


@pytest.mark.parametrize("key", ["IVF64,SQ8", "IVF1,PQ4x8", "IVF4,PQ8x8", "IVF1,PQ16x4fs"])
def test_list_and_code_of_a_vector_depend_on_it_alone(key: str, tmp_path: Path) -> None:
    """FAISS alone puts vectors on a border elsewhere when few are added at once."""
    x = vectors(6000, dim=64)
    template = ivf.train_template(x, key, seed=0, num_threads=1)
    index = faiss.deserialize_index(np.frombuffer(template.data, np.uint8))
    if "PQ" in key:
        pieces = faiss.vector_to_array(index.pq.centroids).reshape(index.pq.M, index.pq.ksub, index.pq.dsub)
        offset = np.asarray(index.quantizer.reconstruct_n(0, 1))[0]
        borders = offset + np.concatenate(
            [on_borders(of_piece, 2000, seed=m) for m, of_piece in enumerate(pieces)], axis=1
        )
    else:
        borders = on_borders(np.asarray(index.quantizer.reconstruct_n(0, 64)), 2000, seed=0)
    ids = np.arange(2000, dtype=np.int64)
    few = [tmp_path / f"{start}.part" for start in range(0, 2000, 50)]
    for at, path in enumerate(few):
        rows = slice(50 * at, 50 * at + 50)
        ivf.build_part(template, [(borders[rows], ids[rows])], path, num_threads=1)
    ivf.merge_parts(template, few, tmp_path / "few")
    ivf.build_part(template, [(borders, ids)], tmp_path / "all", num_threads=2)
    assert (tmp_path / "few").read_bytes() == (tmp_path / "all").read_bytes()


@pytest.mark.parametrize("key", KEYS)
def test_no_vectors_at_all_are_an_index_too(
    key: str, templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    empty = ivf.build_part(templates[key], [], tmp_path / "empty", num_threads=1)
    assert (empty.num_vectors, empty.first_id, empty.ids_sum) == (0, -1, 0)
    merged = ivf.merge_parts(templates[key], [tmp_path / "empty"], tmp_path / "merged")
    assert merged == empty
    distances, ids = found(tmp_path / "merged", k=3)
    assert np.isinf(distances).all() and (ids == -1).all()


@pytest.mark.parametrize("key", KEYS)
def test_a_search_for_more_than_there_is_is_padded(
    key: str, templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    (path,) = build(templates[key], tmp_path, [0, 7])
    distances, ids = found(path, nprobe=999, k=12)
    assert (np.sort(ids[:, :7], axis=1) == IDS[:7]).all()
    assert np.isfinite(distances[:, :7]).all() and (np.diff(distances[:, :7]) >= 0).all()
    assert (ids[:, 7:] == -1).all() and np.isinf(distances[:, 7:]).all()


@pytest.mark.parametrize("nprobe", [3, 9])
def test_a_query_alone_finds_what_it_finds_among_many(
    nprobe: int, templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    """But of entries as far as the last, which there are more of than are asked for."""
    build_whole(templates["IVF16,PQ16x4fs"], tmp_path / "whole")
    index = ivf.open_index(tmp_path / "whole")
    distances, ids = index.search(QUERIES, 30, nprobe)
    alone = [index.search(q[None], 30, nprobe) for q in QUERIES]
    np.testing.assert_array_equal(np.concatenate([each[0] for each in alone]), distances)
    for row, (_, own) in enumerate(alone):
        nearer = ids[row, distances[row] < distances[row, -1]]
        assert set(nearer.tolist()) <= set(own[0].tolist())


def test_flat_distances_are_squared_l2(templates: dict[str, ivf.Template], tmp_path: Path) -> None:
    (path,) = build(templates["Flat"], tmp_path, [0, 1200])
    distances, ids = found(path, k=1)
    true = ((QUERIES[:, None, :] - GALLERY[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(ids[:, 0], IDS[true.argmin(1)])
    np.testing.assert_allclose(distances[:, 0], true.min(1), rtol=1e-4)


@pytest.mark.parametrize("key", KEYS)
def test_a_template_is_the_same_for_the_same_seed_and_known_from_its_bytes(
    key: str, templates: dict[str, ivf.Template]
) -> None:
    again = ivf.train_template(GALLERY[::2], key, seed=3, num_threads=3)
    assert again == templates[key] and again.hash == templates[key].hash
    assert ivf.load_template(again.data) == again
    other = ivf.train_template(GALLERY[::2], key, seed=4, num_threads=1)
    assert (other.hash == again.hash) == (key == "Flat")


@pytest.mark.parametrize("key", KEYS)
def test_centroids_are_found_by_all_gpus_where_they_are_asked_for(
    key: str, templates: dict[str, ivf.Template], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU stands in for the GPUs, so the template has to be the same."""
    moved: list[faiss.Index] = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: moved.append(index) or index)
    trained = ivf.train_template(GALLERY[::2], key, seed=3, num_threads=1, on_gpus=True)
    assert trained == templates[key]
    num_lists = index_files.parse_key(key, dim=DIM).num_lists
    assert [index.ntotal for index in moved] == ([num_lists] if num_lists else [])


def test_gpus_that_are_not_there_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(ConfigError, match="FAISS sees no GPU"):
        ivf.train_template(GALLERY, "IVF16,SQ8", seed=3, num_threads=1, on_gpus=True)


@pytest.mark.parametrize("key", KEYS[1:])
def test_a_part_of_another_template_is_refused(
    key: str, templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    other = ivf.train_template(GALLERY[1::2], key, seed=3, num_threads=1)
    build(templates[key], tmp_path, [0, 600])
    ivf.build_part(other, [(GALLERY[600:], IDS[600:])], tmp_path / "other", num_threads=1)
    with pytest.raises(ManifestError, match=r"other was built from template"):
        ivf.merge_parts(templates[key], [tmp_path / "0.part", tmp_path / "other"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ManifestError, match=r"of template"):
        ivf.open_index([tmp_path / "0.part", tmp_path / "other"])


def test_other_codebooks_under_the_same_centroids_are_another_template(
    templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    index = faiss.deserialize_index(np.frombuffer(templates["IVF16,PQ8x8"].data, np.uint8))
    index.pq.train(GALLERY[:300])
    index.add_with_ids(GALLERY[:10], IDS[:10])
    faiss.write_index(index, str(tmp_path / "other"))
    with pytest.raises(ManifestError, match="was built from template"):
        ivf.merge_parts(templates["IVF16,PQ8x8"], [tmp_path / "other"], tmp_path / "merged")


@pytest.mark.parametrize("key", KEYS)
def test_ids_that_lie_in_two_parts_are_refused(
    key: str, templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    parts = build(templates[key], tmp_path, [0, 600])
    ivf.build_part(templates[key], [(GALLERY[599:], IDS[599:])], tmp_path / "again", num_threads=1)
    with pytest.raises(ManifestError, match="overlap"):
        ivf.merge_parts(templates[key], [*parts, tmp_path / "again"], tmp_path / "merged")
    with pytest.raises(ManifestError, match="overlap"):
        ivf.merge_parts(templates[key], [parts[0], parts[0]], tmp_path / "merged")


def test_an_id_twice_in_one_part_is_refused(templates: dict[str, ivf.Template], tmp_path: Path) -> None:
    index = faiss.deserialize_index(np.frombuffer(templates["IVF16,SQ8"].data, np.uint8))
    index.add_with_ids(GALLERY[:4], np.array([5, 6, 6, 7]))
    faiss.write_index(index, str(tmp_path / "part"))
    with pytest.raises(ManifestError, match=r"1 ids twice, 6 among them"):
        ivf.inspect(tmp_path / "part")


@pytest.mark.parametrize("ids", [[3, 2, 5], [1, 1, 2]])
def test_ids_that_do_not_ascend_are_refused(
    ids: list[int], templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    with pytest.raises(ShapeError, match="ascend"):
        ivf.build_part(templates["Flat"], [(GALLERY[:3], np.array(ids))], tmp_path / "part", num_threads=1)
    with pytest.raises(ShapeError, match="after 9 came"):
        blocks = [(GALLERY[:1], np.array([9])), (GALLERY[:1], np.array([9]))]
        ivf.build_part(templates["Flat"], blocks, tmp_path / "part", num_threads=1)
    assert not (tmp_path / "part").exists()


def test_indexes_that_can_not_be_merged_are_refused(
    templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    mapped = faiss.deserialize_index(np.frombuffer(templates["IVF16,SQ8"].data, np.uint8))
    mapped.add_with_ids(GALLERY[:10], IDS[:10])
    mapped.set_direct_map_type(faiss.DirectMap.Hashtable)
    inner = faiss.IndexIVFFlat(faiss.IndexFlatIP(DIM), DIM, 4, faiss.METRIC_INNER_PRODUCT)
    wider = faiss.IndexIDMap(faiss.IndexFlatL2(DIM + 1))
    for index, message in (
        (mapped, "direct map"),
        (inner, "metric"),
        (faiss.IndexHNSWFlat(DIM, 8), "IndexHNSWFlat; expected one of"),
        (faiss.index_factory(DIM, "IVF4,PQ8x4fs"), "FastScan; expected"),
        (faiss.index_factory(DIM, "IVF4_HNSW8,Flat"), "finds its lists by a IndexHNSWFlat"),
        (faiss.IndexFlatL2(DIM), "IndexFlatL2; expected"),
        (wider, "of dimension 33"),
    ):
        faiss.write_index(index, str(tmp_path / "part"))
        with pytest.raises(ManifestError, match=message):
            ivf.merge_parts(templates["IVF16,SQ8"], [tmp_path / "part"], tmp_path / "merged")


def test_panorama_parts_which_faiss_merges_into_nothing_are_refused(
    templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    """faiss #5607: the merged index counts all vectors and finds none."""
    paths = [tmp_path / "0.part", tmp_path / "1.part"]
    empty = faiss.index_factory(DIM, "IVF16,FlatPanorama4")
    empty.train(GALLERY)
    trained = faiss.serialize_index(empty)
    for number, path in enumerate(paths):
        part = faiss.deserialize_index(trained)
        rows = slice(600 * number, 600 * number + 600)
        part.add_with_ids(GALLERY[rows], IDS[rows])
        faiss.write_index(part, str(path))
        assert (part.search(GALLERY[rows], 1)[1][:, 0] == IDS[rows]).mean() > 0.5
        empty.merge_from(part, 0)
    assert empty.ntotal == 1200
    assert (empty.search(GALLERY, 1)[1][:, 0] == IDS).mean() < 0.05
    for template in (templates["IVF16,Flat"], templates["Flat"]):
        with pytest.raises(ManifestError, match=r"0\.part is a IndexIVFFlatPanorama; .* loses the vectors"):
            ivf.merge_parts(template, paths, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("other", ["IVF16,FlatPanorama4", "HNSW8", "IVF4,PQ8x4fs", "OPQ8,IVF4,PQ8x4"])
def test_a_segment_of_a_kind_that_namr_has_not_is_named(
    other: str, templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    (first,) = build(templates["IVF16,Flat"], tmp_path, [0, 100])
    faiss.write_index(faiss.index_factory(DIM, other), str(tmp_path / "other"))
    for paths in ([tmp_path / "other"], [first, tmp_path / "other"]):
        with pytest.raises(ManifestError, match=r"other is a Index\w+; expected one of Flat"):
            ivf.open_index(paths)


def test_a_truncated_part_is_refused(templates: dict[str, ivf.Template], tmp_path: Path) -> None:
    (path,) = build(templates["IVF16,SQ8"], tmp_path, [0, 100])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ManifestError, match="no readable FAISS index"):
        ivf.inspect(path)
    with pytest.raises(ManifestError, match="no FAISS template"):
        ivf.load_template(templates["IVF16,SQ8"].data[:100])


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("IVF16,PQ16x4", "no such index"),
        ("IVF16,RaBitQfs", "of PQ<pieces>x4fs alone"),
        ("IVF16,FlatPanorama4", "without an error and loses the vectors"),
        ("IVF16,PQ5x4fs", "divide the dimension 32"),
        ("IVF16,PQ1x4fs", "an even number of them, each of 15 or fewer"),
        ("IVF16,PQ2x4fs", "2 pieces of 16 dimensions"),
        ("HNSW32", "graph"),
        ("IVF16_HNSW32,Flat", "graph"),
        ("IVF16,Flat,RFlat", "refines"),
        ("IVF0,Flat", "no such index"),
        ("IVF16,PQ8", "no such index"),
        ("OPQ8,IVF16,PQ8x8", "no such index"),
        ("IVF16,PQ5x8", "divide the dimension 32"),
    ],
)
def test_keys_that_are_not_offered_say_why(key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        index_files.parse_key(key, dim=32)


def test_keys_that_are_offered() -> None:
    assert index_files.parse_key("Flat", dim=32) == ("Flat", 0, "Flat", 128, 0)
    assert index_files.parse_key("IVF64,SQ8", dim=32) == ("IVF64,SQ8", 64, "SQ8", 32, 0)
    assert index_files.parse_key("IVF64,PQ8x8", dim=32) == ("IVF64,PQ8x8", 64, "PQ", 8, 256)
    assert index_files.parse_key("IVF64,PQ8x4fs", dim=32) == ("IVF64,PQ8x4fs", 64, "PQ", 4, 16)
    assert index_files.parse_key("IVF64,PQ8x8", dim=32).min_training_vectors == 256


def test_bad_vectors_are_refused(templates: dict[str, ivf.Template], tmp_path: Path) -> None:
    holed = GALLERY[:3].copy()
    holed[1, 4] = np.nan
    with pytest.raises(ShapeError, match="row 1 holds NaN"):
        ivf.build_part(templates["Flat"], [(holed, IDS[:3])], tmp_path / "part", num_threads=1)
    with pytest.raises(ShapeError, match="row 1 holds NaN"):
        ivf.train_template(holed, "Flat", seed=0, num_threads=1)
    with pytest.raises(ShapeError, match="16 vectors or more, the sample has 3"):
        ivf.train_template(GALLERY[:3], "IVF16,Flat", seed=0, num_threads=1)
    (path,) = build(templates["Flat"], tmp_path, [0, 3])
    index = ivf.open_index(path)
    with pytest.raises(ShapeError, match=r"expected \(n, 32\) float32, got \(1, 31\)"):
        index.search(QUERIES[:1, :31], 1, 1)
    with pytest.raises(ShapeError, match="row 1 holds"):
        index.search(holed, 1, 1)
    with pytest.raises(ConfigError, match="k=0"):
        index.search(QUERIES, 0, 1)


def test_another_librarys_patch_of_faiss_changes_no_search(
    templates: dict[str, ivf.Template], tmp_path: Path
) -> None:
    """pytorch-metric-learning imports faiss.contrib.torch_utils, which replaces `search`."""
    build_whole(templates["IVF16,Flat"], tmp_path / "whole")
    before = found(tmp_path / "whole", nprobe=2)
    importlib.import_module("faiss.contrib.torch_utils")
    assert_same(found(tmp_path / "whole", nprobe=2), before)
