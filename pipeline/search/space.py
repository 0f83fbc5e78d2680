"""The space of a search: which settings trials may have, and a check that all of them are valid.

Ray Tune hands a *draw* to each trial: numbers for ranges, positions for choices and grids, whose
values may be lists or sections, which no search algorithm accepts. `settings_of` turns a draw into
values by path, `loading.with_settings` turns these into an experiment.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from pipeline.config.experiment import Experiment
from pipeline.config.loading import ConfigError, with_settings
from pipeline.config.search import Domain, Search

_MOST_CORNERS = 64
_INSIDE = 0.382  # share of a range at which it is probed: rarely a whole number
# Settings that cannot be searched: they say where a trial's results go, which the search decides.
_PLACES = (
    *("name", "description", "run_dir", "search", "checkpoint.uri", "data.root"),
    *("cluster.address", "tracking.uri", "tracking.experiment", "tracking.tags"),
    "tracking.enabled",
)
# Settings that may change while a trial runs: they change neither the meta-parameters nor the
# compiled program.
IN_FLIGHT = ("inner.lr", "outer.lr", "outer.momentum", "outer.weight_decay", "outer.clip_")


def settings_of(search: Search, draw: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a draw stands for, by the path of the setting."""
    return {
        path: domain.values[draw[path]] if _by_position(domain) else draw[path]
        for path, domain in search.space.items()
    }


def draws(search: Search) -> dict[str, Any]:
    """The space in Ray Tune's own terms, by path."""
    from ray import tune

    def tuned(domain: Domain) -> Any:
        low, high = domain.values[0], domain.values[-1]
        positions = range(len(domain.values))
        if search.algorithm == "grid" and domain.kind == "integer":
            return tune.grid_search(list(range(low, high + 1)))
        every = domain.kind == "grid" or search.algorithm == "grid"
        if every and search.algorithm != "tpe":  # tpe draws; it cannot try all values of a grid
            return tune.grid_search(list(positions))
        if _by_position(domain):
            return tune.choice(list(positions))
        if domain.kind == "integer":
            return tune.randint(low, high + 1)
        return getattr(tune, domain.kind)(low, high)

    return {path: tuned(domain) for path, domain in search.space.items()}


def is_random(search: Search) -> bool:
    """Whether settings are drawn at random, so that more samples make more trials."""
    kinds = {domain.kind for domain in search.space.values()}
    return search.algorithm == "tpe" or (search.algorithm == "random" and kinds != {"grid"})


def in_flight(search: Search) -> list[str]:
    """The searched settings that population based training may change."""
    return [path for path in search.space if path.startswith(IN_FLIGHT)]


def within(search: Search, draw: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a draw back into its ranges, which population based training may leave."""

    def bounded(domain: Domain, value: Any) -> Any:
        if _by_position(domain):
            return value
        low, high = domain.values
        inside = min(max(value, low), high)
        return round(inside) if domain.kind == "integer" else inside

    return {path: bounded(search.space[path], value) for path, value in draw.items()}


def corners(search: Search) -> list[dict[str, Any]]:
    """Settings that probe the space: both ends and the inside of every range, and every choice.

    All combinations; where these are too many, one setting is varied at a time.
    """
    probes = {path: _probes(domain) for path, domain in search.space.items()}
    combinations = itertools.product(*probes.values())
    some = list(itertools.islice(combinations, _MOST_CORNERS + 1))
    if len(some) <= _MOST_CORNERS:
        return [dict(zip(probes, values, strict=True)) for values in some]
    first = {path: values[0] for path, values in probes.items()}
    return [{**first, path: value} for path, values in probes.items() for value in values]


def search_of(experiment: Experiment) -> Search:
    """The search section of an experiment. Raises ConfigError if it has none."""
    if experiment.search is None:
        missing = "missing; it says what to try (maml config show sinusoid-search has an example)"
        raise ConfigError(experiment.name, [f"search: {missing}"])
    return experiment.search


def possible_experiments(experiment: Experiment) -> list[Experiment]:
    """The experiments at the corners of the space.

    Raises ConfigError naming every setting that cannot be searched so, or if there is no space.
    """
    search = search_of(experiment)
    errors = {
        f"search.space.{path}: says where things go, so it cannot be searched": None
        for path in search.space
        if any(path == place or path.startswith(f"{place}.") for place in _PLACES)
    }
    if search.scheduler == "pbt" and not in_flight(search):
        errors["search.scheduler: pbt needs a setting that may change in flight, as inner.lr"] = (
            None
        )
    alone = experiment.changed(search=None)
    found = []
    for settings in corners(search):
        try:
            found.append(with_settings(alone, settings))
        except ConfigError as error:
            for line in error.errors:
                named = line.split(":")[0] in search.space
                errors[f"search.space.{line}" if named else f"search.space: {line}"] = None
    if errors:
        raise ConfigError(f"the search of {experiment.name}", list(errors))
    return found


def _by_position(domain: Domain) -> bool:
    """Whether a draw holds the position of the value, instead of the value."""
    return domain.kind in ("choice", "grid")


def _probes(domain: Domain) -> tuple[Any, ...]:
    """The values of one setting that `corners` combines."""
    if domain.kind in ("uniform", "loguniform"):
        low, high = domain.values
        return low, low + _INSIDE * (high - low), high
    return domain.values
