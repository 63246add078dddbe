"""Would another value of one setting fine-tune better? Asked of held-out classes, never of a test's.

    python -m tests.benchmarks.fine_tuning_choices [--losses triplet] [--choices num_clusters=2]

Trained as by `fine_tuning --four-fifths`: once as shipped, but for 300 steps and not augmented, and once for
each of --choices, a field of a config at another value (two fields that belong together: A=1,B=2). The
held-out fifth of the training classes is searched as training does it: among itself and two images of trained
classes for each of its own. No image of a test is read.

Printed are Recall@1 / MAP@R in per cent by L2, by cosine and in the way that these classes recommend, means
of the seeds; and, seed by seed, what the mean of both gains over the shipped setting, each searched as
recommended, with its 95 % interval (a bootstrap over classes). The interval knows of other classes and not of
another run of the same training, which ends elsewhere, so a value is better where several seeds say so. A run
takes about eight minutes of one core, and is kept in --cache.
"""

import ast
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from namr.errors import ConfigError
from namr.measure import validation
from namr.measure.metrics import RetrievalMetrics
from namr.measure.protocols import Split
from namr.model.losses import LossConfig, search_metric_of
from namr.model.model import SearchDefaults
from tests.benchmarks import fine_tuning, method
from tests.benchmarks.fine_tuning import RATES, Run
from tests.benchmarks.method import BASES, Labelled, Setting

SHIPPED = "as shipped"
CHOICES = (
    "warmup_steps=0",
    "schedule=constant",
    "ranking_weight=0.5",
    "ranking_weight=2",
    "num_clusters=2",
    "weight_decay=1e-4",
)
OF_TRAINING = ("warmup_steps", "schedule", "weight_decay", "learning_rate", "backbone_learning_rate")
OF_LOSS = ("ranking_weight", "num_clusters", "structure_side", "alpha", "t", "margin")
OF_MODEL = ("structure_range", "structure_hidden_dim")
OTHERS = 2
"""Images of trained classes for each held-out one, as `train.training_data` has them."""


class Searched(NamedTuple):
    """What held-out images are searched among, and these at its end."""

    images: Labelled
    split: Split


class Measured(NamedTuple):
    """What held-out classes say of one training."""

    l2: RetrievalMetrics
    cosine: RetrievalMetrics
    recommended: RetrievalMetrics
    way: SearchDefaults


def main() -> None:
    options = parse()
    config = fine_tuning.config_of(options)
    cache = options.cache / f"{options.data.name}-{options.size_px}"
    pixels = fine_tuning.pixels_of(options.data / "train", config, cache)
    searched = searched_of(Labelled(np.arange(len(pixels.y)), pixels.y))
    fine_tuning.start_of(config, options.data, cache, validates=True)
    for base in options.losses:
        setting = Setting(SHIPPED, LossConfig(base=base), config, options.steps)
        training = replace(RATES, num_steps=options.steps)
        plan = {
            choice: [
                changed(Run(setting, seed, training, True, cache, options.data), choice)
                for seed in range(options.seeds)
            ]
            for choice in (SHIPPED, *options.choices)
        }
        runs = [run for of_choice in plan.values() for run in of_choice]
        fine_tuning.train_all(runs, train, processes=options.processes)
        measured = {
            choice: [measure(run, searched) for run in of_choice] for choice, of_choice in plan.items()
        }
        print(f"\n{table(base, measured)}", flush=True)


def parse() -> Any:
    parser = fine_tuning.parser_of(__doc__ or "")
    parser.add_argument("--losses", nargs="+", default=["triplet"], choices=BASES)
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), metavar="FIELD=VALUE")
    return method.parsed(parser)


def changed(run: Run, choice: str) -> Run:
    """The run with these fields of its configs at other values, and named for them."""
    setting, training = replace(run.setting, name=choice), run.training
    for name, value in [] if choice == SHIPPED else map(read, choice.split(",")):
        if name in OF_TRAINING:
            training = replace(training, **{name: value})
        elif name in OF_LOSS:
            setting = replace(setting, loss=replace(setting.loss, **{name: value}))
        elif name in OF_MODEL:
            setting = replace(setting, model=replace(setting.model, **{name: value}))
        else:
            fields = ", ".join(OF_TRAINING + OF_LOSS + OF_MODEL)
            raise ConfigError(f"{name}={value}: expected a value of one of {fields}")
    return run._replace(setting=setting, training=training)


def read(field: str) -> tuple[str, Any]:
    """Its name and value."""
    name, _, written = field.partition("=")
    try:
        return name, ast.literal_eval(written)
    except ValueError:
        return name, written


def train(run: Run) -> str:
    """In a process of its own."""
    pixels = fine_tuning.pixels_of(run.data / "train", run.setting.model, run.cache)
    return fine_tuning.train_on(method.split(pixels)[0], run, {"searched": searched_of(pixels).images})


def searched_of(train: Labelled) -> Searched:
    learnt, held_out = method.split(train)
    others = np.random.default_rng(0).permutation(len(learnt.y))[: OTHERS * len(held_out.y)]
    images = Labelled(
        np.concatenate([learnt.x[others], held_out.x]),
        np.concatenate([learnt.y[others], held_out.y + learnt.y.max() + 1]),
    )
    rows = np.arange(len(images.y))
    return Searched(images, Split(queries=rows[len(others) :], gallery=rows))


def measure(run: Run, searched: Searched) -> Measured:
    ways = validation.ways(search_metric_of(run.setting.loss))
    ways = ways if run.setting.has_structure else ways[:2]
    entry = fine_tuning.entry_of(run, "searched")
    results = validation.measure(
        entry.embeddings, entry.structures, searched.images.y, ways=ways, splits=[searched.split]
    )
    plain = {way.metric: results[way] for way in ways[:2]}
    best = validation.choose(results, ways)
    return Measured(plain["l2"], plain["cosine"], results[best], best)


def table(base: str, measured: dict[str, Sequence[Measured]]) -> str:
    """A row for each choice."""
    lines = [
        f"| {base}, Recall@1 / MAP@R (%) | L2 | cosine | as recommended | gain, in points |",
        "| --- | --- | --- | --- | --- |",
    ]
    for choice, of_seeds in measured.items():
        cells = [cell([m.l2 for m in of_seeds]), cell([m.cosine for m in of_seeds])]
        ways = ", ".join(dict.fromkeys(validation.name_of(m.way) for m in of_seeds))
        cells.append(f"{cell([m.recommended for m in of_seeds])} ({ways})")
        pairs = zip(of_seeds, measured[SHIPPED], strict=True)
        gains = [method.gain_of(one.recommended, other.recommended) for one, other in pairs]
        cells.append("" if choice == SHIPPED else ", ".join(gains))
        lines.append(f"| {choice} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(of_seeds: list[RetrievalMetrics]) -> str:
    mean = method.mean_metrics(of_seeds)
    return f"{100 * mean.recall_at_1:.1f} / {100 * mean.map_at_r:.2f}"


if __name__ == "__main__":
    main()
