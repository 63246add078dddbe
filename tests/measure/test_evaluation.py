"""The table: hand-worked cells, what its text says, and real models on a real dataset, stored or computed."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from namr.data import datasets, images
from namr.data.loading import LoaderConfig
from namr.embed import embeddings
from namr.errors import ConfigError, ManifestError
from namr.measure import evaluation, protocols
from namr.measure.evaluation import Comparison, Entry, EvaluationConfig
from namr.model import model
from namr.model.model import ModelConfig, SearchDefaults
from namr.store.tables import EmbeddingTable
from tests.small_training import make_dataset

# On a line: 0 and 1 of class 0, 3 and 9 of class 1. Plain: 0 -> 1, 1 -> 0, 3 -> 1 (wrong), 9 -> 3.
LINE = np.array([[0.0], [1.0], [3.0], [9.0]], np.float32)
LABELS = np.array([0, 0, 1, 1])


def test_the_cells_of_four_points_on_a_line() -> None:
    table = evaluation.compare([Entry("line", LINE + 1, None, "l2")], LABELS, set_name="four")
    row = table.row("line")
    assert row.by_column["l2"].recall_at_1 == 0.75
    assert row.by_column["l2"].map_at_r == 0.75
    assert set(row.by_column) == {"l2", "cosine"}
    assert "four: 4 images of 2 classes" in table.title


def test_structure_that_stretches_the_axis_fills_the_columns_of_re_ranking() -> None:
    # s of class 0 is 100. By scale (10), 9 is nearer to 3 than 1 is, and 3 nearer to 0 than 1 is; by both,
    # every distance from one class to the other is 50.5 times as long, squared, and all four are right.
    structures = np.array([[100.0], [100.0], [1.0], [1.0]], np.float32)
    table = evaluation.compare([Entry("line", LINE, structures, "l2")], LABELS, set_name="four")
    cells = {name: found.recall_at_1 for name, found in table.row("line").by_column.items()}
    assert set(cells) == {"l2", "cosine", "scale", "query", "both"}
    assert cells["query"] == cells["l2"] == 0.75  # one number a query orders nothing anew
    assert cells["scale"] == 0.5
    assert cells["both"] == 1.0


def test_queries_against_a_gallery_by_hand() -> None:
    """LINE is the gallery; 2.4 of class 0 sees 3 1 0 9: b a a b, and 8 of class 1 sees 9 3: b b.

    For 2.4 R = 2: hit at 2 but not at 1, AP = (0 + 1/2) / 2; for 8 AP = 1. 5 is of a class that isn't there.
    """
    x = np.concatenate([LINE, [[2.4], [8.0], [5.0]]]).astype(np.float32)
    labels = np.array([0, 0, 1, 1, 0, 1, 2])
    table = evaluation.compare(
        [Entry("line", x, np.ones_like(x), "l2")],
        labels,
        set_name="four",
        splits=protocols.query_and_gallery(num_gallery=4, num_queries=3),
        protocol="three query them",
        recall_at=(1, 2, 30),
    )
    assert table.title.startswith(
        "four: 4 images of 2 classes; three query them (1 without a match left out);"
    )
    for name in ("l2", "scale", "query", "both"):  # s = 1 re-ranks nothing
        found = table.row("line").by_column[name]
        assert found.recall_at_k == {1: 0.5, 2: 1.0, 30: 1.0}
        assert found.map_at_r == 0.625


def test_one_image_of_each_class_as_the_gallery_by_hand() -> None:
    """Where the gallery is 0 or 1 with 3, both queries are right; with 9, the query 3 is nearer to 0 or 1."""
    splits = protocols.one_a_class(LABELS, num_draws=50, seed=3)
    drawn = {tuple(split.gallery.tolist()) for split in splits}
    assert drawn == {(0, 2), (0, 3), (1, 2), (1, 3)}
    wrong = {(0, 3): 1, (1, 3): 1, (0, 2): 0, (1, 2): 0}  # of two queries
    table = evaluation.compare([Entry("line", LINE, None, "l2")], LABELS, set_name="four", splits=splits)
    expected = 1 - sum(wrong[tuple(split.gallery.tolist())] for split in splits) / (2 * len(splits))
    assert table.row("line").by_column["l2"].recall_at_1 == pytest.approx(expected)
    assert 0.6 < expected < 0.9


def test_a_set_without_pairs_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match="two: 2 labelled images and no query with another image of its class"
    ):
        evaluation.compare([], np.array([0, 1]), set_name="two")


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", num_classes=4, per_class=4)


Saved = Callable[[str, float], str]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    def save(name: str, structure_range: float) -> str:
        config = ModelConfig(
            backbone="test_efficientnet",
            weights="none",
            embedding_dim=8,
            structure_hidden_dim=8,
            structure_range=structure_range,
            image_size_px=32,
        )
        built = model.build(config, seed=4).eval()
        built.search = SearchDefaults(metric="cosine", structure_side="none")
        model.save(built, tmp_path / name, extra={"trained_for": "l2"})
        return str(tmp_path / name)

    return save


def evaluated(data_uri: str, folder: Path, **changes: object) -> Comparison:
    loader = LoaderConfig(num_workers=0, cache_folder=folder / "cache")
    return evaluation.evaluate(
        EvaluationConfig(dataset_uri=data_uri, loader=loader, batch_size=8, **changes)  # type: ignore[arg-type]
    )


def test_models_raw_pixels_and_the_untrained_network_in_one_table(
    data_uri: str, saved: Saved, tmp_path: Path
) -> None:
    table = evaluated(
        data_uri,
        tmp_path,
        models=(f"no structure={saved('one', 0.0)}", f"both={saved('both', 0.5)}"),
        raw_pixels=True,
        untrained=True,
        whitened_by=data_uri,
        report_uri=str(tmp_path / "report"),
    )
    names = ["raw pixels", "untrained", "whitened, untrained", "no structure", "both"]
    assert [row.name for row in table.rows] == names
    assert [len(row.by_column) for row in table.rows] == [2, 2, 2, 2, 5]
    assert table.row("both").metric == "l2"
    assert (table.num_images, table.num_classes) == (16, 4)
    assert table.row("raw pixels").by_column["l2"].recall_at_1 > 0.9
    assert (tmp_path / "report" / "evaluation.md").read_text() == table.to_markdown()
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["num_images"] == 16


def test_stored_embeddings_give_the_same_table(data_uri: str, saved: Saved, tmp_path: Path) -> None:
    reference = saved("both", 0.5)
    computed = evaluated(data_uri, tmp_path, models=(f"both={reference}",))
    extract(data_uri, reference, str(tmp_path / "embeddings"))
    stored = evaluated(
        data_uri, tmp_path, models=(f"both={reference}",), embeddings_uri=str(tmp_path / "embeddings")
    )
    assert stored == computed


def test_one_dataset_queries_another(data_uri: str, saved: Saved, tmp_path: Path) -> None:
    """The queries are the same pictures as the gallery's, in which each finds itself; two classes more."""
    query_uri = make_dataset(tmp_path / "queries", num_classes=6, per_class=3)
    reference = saved("both", 0.5)
    options: dict[str, object] = {"models": (f"both={reference}",), "raw_pixels": True, "recall_at": (1, 3)}
    table = evaluated(data_uri, tmp_path, query_uri=query_uri, **options)
    assert (table.num_images, table.num_classes) == (16, 4)
    assert f"the 18 images of {query_uri} version 1 query them (6 without a match left out)" in table.title
    for row in table.rows:
        for found in row.by_column.values():
            assert (found.num_queries, found.num_skipped) == (12, 6)
            assert set(found.recall_at_k) == {1, 3}
        assert row.by_column["l2"].recall_at_1 == 1.0
    extract(data_uri, reference, str(tmp_path / "embeddings"))
    extract(query_uri, reference, str(tmp_path / "embeddings"))
    options |= {"embeddings_uri": str(tmp_path / "embeddings")}
    assert evaluated(data_uri, tmp_path, query_uri=query_uri, **options) == table


def test_one_image_a_class_is_drawn_from_a_dataset(data_uri: str, tmp_path: Path) -> None:
    table = evaluated(data_uri, tmp_path, models=(), raw_pixels=True, gallery_draws=10)
    assert "4 images of 4 classes; drawn 10 times, and each time the 12 others query them;" in table.title
    found = table.row("raw pixels").by_column["l2"]
    assert (found.num_queries, found.num_skipped) == (120, 0)
    assert found.map_at_r == found.recall_at_1  # there is one to be found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall_at": (0, 1)}, r"recall_at is \(0, 1\)"),
        ({"recall_at": ()}, r"recall_at is \(\)"),
        ({"gallery_draws": -1}, "gallery_draws is -1"),
        ({"gallery_draws": 10, "query_uri": "y"}, "gallery_draws is 10 and query_uri y"),
        ({"query_uri": "./x/"}, r"query_uri is the dataset \./x/ itself"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig(dataset_uri="x", models=(), **options)  # type: ignore[arg-type]


def test_embeddings_that_were_not_extracted_are_missed_by_name(
    data_uri: str, saved: Saved, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match="namr-embeddings"):
        evaluated(data_uri, tmp_path, models=(f"a={saved('a', 0.5)}",), embeddings_uri=str(tmp_path / "e"))


def test_a_dataset_without_labels_can_not_be_evaluated(saved: Saved, tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "unlabelled", num_classes=2, labelled=False)
    with pytest.raises(ConfigError, match="no image has a label"):
        evaluated(uri, tmp_path, models=(f"a={saved('a', 0.5)}",))


def test_a_model_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="NAME=FOLDER"):
        EvaluationConfig(dataset_uri="x", models=("models:/namr@candidate",))


def extract(data_uri: str, reference: str, root: str) -> None:
    """Embeddings of every shard, as extraction stores them, in float32."""
    dataset = datasets.open_version(data_uri)
    one = model.load(Path(reference))
    files = []
    for entry in dataset.shards:
        table = dataset.samples(entry)
        tar = Path(dataset.shard_uri(entry)).read_bytes()
        pixels = [
            images.prepare(tar[offset : offset + size], one.preprocessing)
            for offset, size in zip(table.offsets, table.sizes, strict=True)
        ]
        x, s = model.embed(one, np.stack(pixels), batch_size=8, device="cpu")
        stored = EmbeddingTable(
            ids=table.ids, keys=table.keys, labels=table.labels, embeddings=x, structures=s,
            refused_ids=np.empty(0, np.int64), refused_keys=[], refused_reasons=[],
        )  # fmt: skip
        files.append(embeddings.write(root, model.digest(one), entry, stored).file)
    embeddings.publish_set(root, model.digest(one), dataset, files)
