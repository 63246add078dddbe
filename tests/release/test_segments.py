"""How rows become parts, and what a segment leaves behind; that it is the one index, test_build.py shows."""

from namr.embed.embeddings import EmbeddingFile
from namr.release import segments
from namr.store.manifests import StoredObject


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
