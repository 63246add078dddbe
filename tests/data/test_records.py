"""What is remembered of erased images: enough to know them again, and nothing to read."""

from namr.data import records
from namr.data.records import Emptied
from namr.store.manifests import StoredObject


def emptied(number: int, *ids: int) -> Emptied:
    tar, index = (StoredObject(f"{number}.{suffix}", 1, "0" * 64) for suffix in ("tar", "parquet"))
    return Emptied(number=number, erasure_id=f"e{number}", version=2, ids=ids, tar=tar, index=index)


def test_an_erased_key_is_known_again_in_its_dataset_alone() -> None:
    told = records.key_of_erased("one", "photos/anna.jpg")
    assert told == records.key_of_erased("one", "photos/anna.jpg")
    others = {records.key_of_erased("two", "photos/anna.jpg"), records.key_of_erased("one", "photos/ann.jpg")}
    assert told not in others and len(others) == 2
    assert "anna" not in told


def test_ids_and_reasons_are_those_of_the_shards_asked_for() -> None:
    both = [emptied(3, 7, 8), emptied(5, 9)]
    assert records.ids_of(both, {3}) == {7, 8}
    assert records.ids_of(both, {3, 4, 5}) == {7, 8, 9}
    why = records.why_gone(both, both[1].index)
    assert why is not None and why.startswith(
        "erasure e5 emptied the shard since this run began; run the same"
    )
    assert records.why_gone(both, StoredObject("6.tar", 1, "0" * 64)) is None
