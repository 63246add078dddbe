"""How rows become parts, and what a segment leaves behind; that it is the one index, test_build.py shows."""

from pathlib import Path

import numpy as np
import pytest

from namr.embed.embeddings import EmbeddingFile
from namr.index import planning
from namr.release import segments
from namr.release.build_steps import HeldOut, VectorSource
from namr.store.manifests import StoredObject
from tests.release.test_build_steps import DEAD, DIM, NUM_ROWS, live_ids, store_embeddings


def a_file(number: int, num_embedded: int) -> EmbeddingFile:
    stored = StoredObject("x", 1, "0" * 64)
    return EmbeddingFile(
        number=number,
        stored=stored,
        num_embedded=num_embedded,
        num_refused=0,
        embedding_dim=4,
        dtype="float16",
    )


def test_parts_are_even_ranges_whatever_the_shards_are() -> None:
    files = [a_file(0, 10), a_file(1, 0), a_file(2, 1), a_file(3, 4)]
    parts = segments.cut(files, 4)
    assert [[(rows.file.number, rows.start, rows.stop) for rows in part] for part in parts] == [
        [(0, 0, 3)],
        [(0, 3, 7)],
        [(0, 7, 10), (2, 0, 1)],
        [(3, 0, 4)],
    ]
    assert segments.cut(files[1:2], 2) == [[], []]
    assert sum(len(part) for part in segments.cut(files[2:3], 3)) == 1


def test_each_file_gives_its_share_of_the_sample() -> None:
    files = [a_file(0, 300), a_file(1, 0), a_file(2, 1), a_file(3, 699)]
    picks = segments.picked(files, 100, seed=3)
    assert [(file.number, len(rows)) for file, rows in picks] == [(0, 30), (3, 70)]
    for file, rows in picks:
        assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < file.num_embedded
    again, other = segments.picked(files, 100, seed=3), segments.picked(files, 100, seed=4)
    assert all(np.array_equal(one[1], two[1]) for one, two in zip(picks, again, strict=True))
    assert not any(np.array_equal(one[1], two[1]) for one, two in zip(picks, other, strict=True))
    whole = segments.picked(files, 10**6, seed=3)
    assert [len(rows) for _, rows in whole] == [300, 1, 699]
    assert segments.picked(files[1:2], 5, seed=3) == segments.picked([], 5, seed=3) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_sample_goes_through_the_work_folder_and_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_FILES_PER_SAMPLE_TASK", 1)
    files = [store_embeddings(str(tmp_path / "embeddings"), number) for number in NUM_ROWS]
    source = VectorSource(embeddings_uri=str(tmp_path / "embeddings"), dead=DEAD, metric="l2")
    given: list[object] = []
    in_order = segments.ray_connection.in_order

    def watched(what: str, function: object, tasks: list[object], **how: float) -> list[object]:
        given.extend([what, how, results := in_order(what, function, tasks, **how)])
        return results

    monkeypatch.setattr(segments.ray_connection, "in_order", watched)
    built = segments.build(
        source,
        files,
        planning.plan(98, DIM, key="IVF4,SQ8", num_parts=3),
        HeldOut(0.1, 0),
        seed=0,
        use_gpu=False,
        work_uri=str(tmp_path / "work"),
        releases_uri=str(tmp_path / "releases"),
    )
    assert built.segment.info.num_vectors == len(live_ids(files[0])) + len(live_ids(files[1]))
    sampled = given[given.index("sampling embeddings") + 2]
    assert isinstance(sampled, list) and len(sampled) == 2
    assert not any(isinstance(part, np.ndarray) for some in sampled for part in some)
    assert given[given.index("training") + 1] == {"num_gpus": 0.0}
    assert list((tmp_path / "work").glob("sample-*")) == []
