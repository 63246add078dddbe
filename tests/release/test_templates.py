"""What the template is trained on, and what that leaves behind."""

from pathlib import Path

import numpy as np
import pytest

from namr.index import planning
from namr.release import templates
from namr.release.build_steps import HeldOut, VectorSource
from tests.release.test_build_steps import DEAD, DIM, NUM_ROWS, store_embeddings
from tests.release.test_segments import a_file


def test_each_file_gives_its_share_of_the_sample() -> None:
    files = [a_file(0, 300), a_file(1, 0), a_file(2, 1), a_file(3, 699)]
    picks = templates.picked(files, 100, seed=3)
    assert [(file.number, len(rows)) for file, rows in picks] == [(0, 30), (3, 70)]
    for file, rows in picks:
        assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < file.num_embedded
    again, other = templates.picked(files, 100, seed=3), templates.picked(files, 100, seed=4)
    assert all(np.array_equal(one[1], two[1]) for one, two in zip(picks, again, strict=True))
    assert not any(np.array_equal(one[1], two[1]) for one, two in zip(picks, other, strict=True))
    whole = templates.picked(files, 10**6, seed=3)
    assert [len(rows) for _, rows in whole] == [300, 1, 699]
    assert templates.picked(files[1:2], 5, seed=3) == templates.picked([], 5, seed=3) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_sample_goes_through_the_work_folder_and_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "_FILES_PER_SAMPLE_TASK", 1)
    files = [store_embeddings(str(tmp_path / "embeddings"), number) for number in NUM_ROWS]
    source = VectorSource(embeddings_uri=str(tmp_path / "embeddings"), dead=DEAD, metric="l2")
    given: list[object] = []
    in_order = templates.ray_connection.in_order

    def watched(what: str, function: object, tasks: list[object], **how: float) -> list[object]:
        given.extend([what, how, results := in_order(what, function, tasks, **how)])
        return results

    monkeypatch.setattr(templates.ray_connection, "in_order", watched)
    trained = templates.train(
        source,
        files,
        planning.plan(98, DIM, key="IVF4,SQ8", num_parts=3),
        HeldOut(0.1, 0),
        seed=0,
        use_gpu=False,
        work_uri=str(tmp_path / "work"),
        releases_uri=str(tmp_path / "releases"),
    )
    assert (tmp_path / "releases" / trained.stored.name).read_bytes() == trained.template.data
    sampled = given[given.index("sampling embeddings") + 2]
    assert isinstance(sampled, list) and len(sampled) == 2
    assert not any(isinstance(part, np.ndarray) for some in sampled for part in some)
    assert given[given.index("training") + 1] == {"num_gpus": 0.0}
    assert list((tmp_path / "work").glob("sample-*")) == []
