import pytest

from namr import engine
from namr.errors import ConfigError


def squared(number: int) -> int:
    if number == 7:
        raise ConfigError("seven is not allowed")
    return number * number


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_tasks_yield_every_result_with_its_position() -> None:
    results = dict(engine.map_tasks(squared, range(6), max_in_flight=2))
    assert results == {number: number**2 for number in range(6)}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_task_that_fails_raises_its_own_exception() -> None:
    with pytest.raises(ConfigError, match="seven is not allowed"):
        list(engine.map_tasks(squared, range(30)))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_no_arguments_are_no_tasks() -> None:
    assert list(engine.map_tasks(squared, [])) == []


def test_an_address_where_nothing_listens_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"no Ray answers at '127\.0\.0\.1:9'"):
        engine.connect("127.0.0.1:9")
