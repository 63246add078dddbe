"""Range checks of what people configure, said alike everywhere."""

import math

from namr.errors import ConfigError


def in_range(
    config: object,
    *names: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    place: str = "",
) -> None:
    """ConfigError, naming the field, unless each of these fields of a config lies in the range.

    None (no value was given) passes; infinity and NaN never do. place: the config's name in the job, as in
    `training.num_steps`.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        fits = (
            (isinstance(value, int) or math.isfinite(value))  # an int may be too large for a float
            and (at_least is None or value >= at_least)
            and (above is None or value > above)
            and (at_most is None or value <= at_most)
            and (below is None or value < below)
        )
        if not fits:
            field = f"{place}.{name}" if place else name
            raise ConfigError(f"{field} is {value}; expected {_range(at_least, above, at_most, below)}")


def _range(at_least: float | None, above: float | None, at_most: float | None, below: float | None) -> str:
    if at_least is not None and at_most is not None:
        return f"{at_least} to {at_most}"
    told = {"{} or more": at_least, "more than {}": above, "at most {}": at_most, "less than {}": below}
    limits = [words.format(limit) for words, limit in told.items() if limit is not None]
    return " and ".join(limits) or "a finite number"
