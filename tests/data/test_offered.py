"""Images in a file: by key, held against a dataset, ordered by a seed, as if they were a list."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from namr.data.offered import Offered, SourceImage
from namr.data.shards import make_id
from namr.errors import ConfigError
from namr.store.tables import SampleTable

IMAGES = [
    SourceImage(key="b", location="/b.jpg", label="cat", num_bytes=10),
    SourceImage(key="ä", location="s3://x/ä.jpg", fields={"price": 1.5, "is": True, "ß": "ß", "n": 2**60}),
    SourceImage(key="a", location="digits[0]", label="", num_bytes=3, data=b"\0png"),
    SourceImage(key="Z", location="s3://x/z.jpg", label="cat"),
    SourceImage(key="\U0001f600", location="/😀.jpg", label="dog", num_bytes=5),
]


def of(images: list[SourceImage]) -> Offered:
    return Offered.of(images, source="s")


def test_images_come_back_as_they_were_by_ascending_key() -> None:
    offered = of(IMAGES)
    expected = sorted(IMAGES, key=lambda image: image.key)
    assert list(offered) == expected
    assert len(offered) == 5
    assert [offered[place] for place in range(5)] == expected
    with pytest.raises(IndexError):
        offered[5]
    assert offered.num_bytes == 18
    assert (len(of([])), list(of([])), of([]).num_bytes) == (0, [], 0)


def test_a_key_that_is_there_twice_is_refused_with_both_places() -> None:
    with pytest.raises(ConfigError, match=r"s: /b\.jpg and /other\.png have the same key 'b'"):
        of([*IMAGES, replace(IMAGES[0], location="/other.png")])


def shard_of(*rows: tuple[str, str | None, int]) -> SampleTable:
    num = len(rows)
    keys, labels, sizes = ([row[column] for row in rows] for column in range(3))
    return SampleTable(
        ids=make_id(3, 0) + np.arange(num),
        keys=keys,
        labels=labels,
        fields=["{}"] * num,
        offsets=np.zeros(num, np.int64),
        sizes=np.array(sizes, np.int64),
    )


def test_what_is_known_is_taken_out_and_counted() -> None:
    offered = of(IMAGES)
    table = shard_of(("nobody", None, 1), ("ä", None, 99), ("b", "cat", 10))
    offered.meet(table, live=np.array([True, True, True]))
    assert offered.remove_known() == 2  # the size of one is not known, and not compared
    assert offered.remove_known() == 0
    assert [image.key for image in offered] == ["Z", "a", "\U0001f600"]
    assert list(offered.old_ids(["Z", "a", "b", "nobody"])) == []


def test_other_labels_and_sizes_stay_with_the_id_that_they_had() -> None:
    offered = of(IMAGES)
    rows = [("Z", "dog", 7), ("\U0001f600", "dog", 6), ("a", None, 3), ("b", "cat", 10), ("ä", "", 1)]
    offered.meet(shard_of(*rows), live=np.ones(5, np.bool_))
    assert [image.key for image in offered.same_in(3)] == ["b"]
    assert list(offered.same_in(2)) == list(offered.same_in(4)) == []
    assert offered.remove_known() == 1
    assert sorted(offered.old_ids([row[0] for row in rows])) == [make_id(3, row) for row in (0, 1, 2, 4)]


def test_of_what_a_library_holds_in_memory_the_label_alone_counts() -> None:
    offered = of(IMAGES)
    offered.meet(shard_of(("a", "", 999)), live=np.array([True]))
    assert list(offered.same_in(3)) == []
    assert offered.remove_known() == 1


@pytest.mark.parametrize("is_live", [True, False])
def test_a_key_that_was_taken_out_is_known_unless_it_lives_on(is_live: bool) -> None:
    offered = of(IMAGES)
    offered.meet(shard_of(("b", "dog", 10)), live=np.array([is_live]))
    offered.meet(shard_of(("b", "other", 10)), live=np.array([False]))
    assert offered.remove_known() == (0 if is_live else 1)
    assert list(offered.old_ids(["b"])) == ([make_id(3, 0)] if is_live else [])


def test_what_is_found_to_have_other_bytes_is_no_more_the_same() -> None:
    offered = of(IMAGES)
    offered.meet(shard_of(("b", "cat", 10)), live=np.array([True]))
    offered.set_changed(["b"])
    assert offered.remove_known() == 0
    assert list(offered.old_ids(["b"])) == [make_id(3, 0)]


def test_labels_are_kept_by_range() -> None:
    offered = of(IMAGES)
    assert list(offered.labels()) == ["", "cat", "dog"]
    offered.keep_labels("cat", "dog")
    assert [image.key for image in offered] == ["Z", "b", "\U0001f600"]


def test_sizes_that_are_not_known_become_one_guess() -> None:
    offered = of(IMAGES)
    assert list(offered.of_unknown_size()) == ["s3://x/z.jpg", "s3://x/ä.jpg"]
    offered.set_unknown_sizes(7)
    assert [image.num_bytes for image in offered] == [7, 3, 10, 7, 5]


def many() -> Iterator[SourceImage]:
    for at in range(300):
        label = None if at % 10 == 9 else f"class {at % 7}"
        yield SourceImage(key=f"k{at}", location=f"/{at}", label=label, num_bytes=at)


def test_classes_lie_together_and_those_without_a_label_last() -> None:
    placed = list(of(list(many())).in_order("class", seed=1, more_bytes=100))
    assert sorted(each.image.key for each in placed) == sorted(image.key for image in many())
    groups = [each.group for each in placed]
    runs = [group for at, group in enumerate(groups) if at == 0 or groups[at - 1] != group]
    assert len(runs) == 8 and runs[-1] is None and runs[:-1] != sorted(runs[:-1])
    for each in placed:
        assert each.image.label == each.group
    for group in runs:
        of_group = [each for each in placed if each.group == group]
        assert {each.group_bytes for each in of_group} == {
            sum(100 + (each.image.num_bytes or 0) for each in of_group)
        }
        numbers = [int(each.image.key[1:]) for each in of_group]
        assert numbers != sorted(numbers)


@pytest.mark.parametrize("order", ["class", "shuffled"])
def test_the_order_is_the_seeds_whatever_the_order_of_finding(order: str) -> None:
    def keys(images: list[SourceImage], seed: int) -> list[str]:
        in_order = of(images).in_order(order, seed=seed, more_bytes=0)  # type: ignore[arg-type]
        return [each.image.key for each in in_order]

    images = list(many())
    assert keys(images, 1) == keys(images[::-1], 1) != keys(images, 2)


def test_shuffled_images_are_one_group() -> None:
    placed = list(of(list(many())).in_order("shuffled", seed=1, more_bytes=0))
    assert {(each.group, each.group_bytes) for each in placed} == {(None, sum(range(300)))}
    assert {each.image.label for each in placed[:40]} >= {None, "class 1", "class 6"}
