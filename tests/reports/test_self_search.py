"""Images that ask their own gallery: which ones, and what each is answered."""

from pathlib import Path

import numpy as np
import pytest

from namr.errors import ConfigError
from namr.reports.self_search import SelfSearchConfig
from namr.search.searcher import Searcher
from tests import planted


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return planted.searcher_of(tmp_path_factory.mktemp("release"))


def test_all_ask_where_they_are_few_and_nobody_finds_itself(searcher: Searcher) -> None:
    asked = planted.ask(searcher)
    assert planted.numbers_of(asked.ids) == list(range(planted.NUM)) and asked.whom == "all 120 images"
    assert (asked.found.ids != asked.ids[:, None]).all()
    keys = [f"digit/{number}" for number in range(planted.NUM)]
    served = [[hit.id for hit in answer.hits] for answer in searcher.search(keys=keys)]
    assert asked.found.ids.tolist() == served


def test_of_many_a_sample_asks_the_same_every_time(searcher: Searcher) -> None:
    one, other = (planted.ask(searcher, most=30) for _ in range(2))
    assert one.whom == "30 of 120 images (drawn at random)"
    assert len(one.ids) == 30 and (np.diff(one.ids) > 0).all() and (one.ids == other.ids).all()


def test_of_what_was_added_to_only_the_new_ask_and_they_ask_everything(searcher: Searcher) -> None:
    asked = planted.ask(searcher, first_new=85)
    assert planted.numbers_of(asked.ids) == list(range(85, 120)) and asked.whom == "all 35 new images"
    near = planted.numbers_of(asked.found.ids.ravel())
    assert min(near) < 85 <= max(near)
    few = planted.ask(searcher, first_new=85, most=10)
    assert len(few.ids) == 10 and min(planted.numbers_of(few.ids)) >= 85


def test_hidden_images_neither_ask_nor_are_found(tmp_path: Path) -> None:
    searcher = planted.searcher_of(tmp_path)
    searcher.hide(np.array([planted.id_of(90), planted.id_of(3)]))
    everybody, new = planted.ask(searcher), planted.ask(searcher, first_new=85)
    assert len(everybody.ids) == 118 and len(new.ids) == 34
    for asked in (everybody, new):
        assert {3, 90} & {
            *planted.numbers_of(asked.ids),
            *planted.numbers_of(asked.found.ids.ravel()),
        } == set()


def test_nobody_asks_where_nothing_is_new(searcher: Searcher) -> None:
    asked = planted.ask(searcher, first_new=120)
    assert asked.whom == "all 0 new images" and asked.found.ids.shape == (0, 10)


def test_to_ask_nobody_is_no_config() -> None:
    with pytest.raises(ConfigError, match="most_asked"):
        SelfSearchConfig(most_asked=0)
