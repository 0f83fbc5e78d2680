"""Experiments: from a name or a YAML file and overrides to a validated configuration.

An experiment is a YAML file of `tune_configs/` (found by name) or anywhere (by path), plus
overrides such as `inner.lr=0.1`. `load` makes an `Experiment` of it, whose errors become one
`ConfigError`: each names the setting, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.algorithms import choose
from pipeline.config.components import component_schema, kinds
from pipeline.config.errors import readable
from pipeline.config.experiment import Experiment
from pipeline.config.wording import counted, cut, shown
from pipeline.config.yaml_text import read
from tasks.credentials import redacted
from tasks.errors import ReportedError

EXPERIMENTS = Path(__file__).resolve().parents[2] / "tune_configs"
_QUICK_LOOK = "sinusoid"
RUNS = "MAML_RUNS"
"""Environment variable: the folder of runs, by default `runs` in the current folder."""


class ConfigError(ReportedError):
    """Everything that is wrong with an experiment; `str()` is the message for a person."""

    def __init__(self, source: str, errors: Sequence[str]):
        """`source` names what the errors are in; '' for an error whose message names it."""
        self.errors = [redacted(error) for error in errors]
        title = f"{counted(len(self.errors), 'error')} in {source}:\n  " if source else ""
        super().__init__(title + "\n  ".join(self.errors))


def experiments() -> dict[str, str]:
    """Names of the shipped experiments and their descriptions: the quick look, then by name."""
    paths = {path.stem: path for path in EXPERIMENTS.glob("*.yaml")}
    return {
        name: str((read(paths[name].read_text()) or {}).get("description", ""))
        for name in sorted(paths, key=lambda name: (name != _QUICK_LOOK, name))
    }


def trained_baseline(experiment: Experiment) -> str | None:
    """The shipped experiment that trains one policy for all tasks of `experiment`, if there is one.

    None for supervised tasks: their baselines are measured by the meta-test.
    """
    # Asked of the configuration, because it is about which experiments are configured.
    name = f"{experiment.name}-pretrained"
    return name if experiment.reinforcement is not None and name in experiments() else None


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment and check all of it.

    `name_or_path` is the name of a shipped experiment (`maml config list`) or the path of a YAML
    file. `overrides` are settings to change, such as `inner.lr=0.1`; their values are read as YAML.
    Returns the experiment with every default filled in. Raises ConfigError with a line for each
    error. All unknown names and wrong values are reported at once; only when there are none of
    these is the rest looked for: everything that contradicts each other or cannot be built.
    """
    try:
        path = _file_of(name_or_path)
        data = read(path.read_text())
    except OSError as error:
        raise ConfigError("", [f"{shown(name_or_path)}: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"not YAML: {error}"]) from None
    if not isinstance(data, dict):
        raise ConfigError(str(path), ["must hold sections (task:, model:, inner:, ...)"])
    data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-") or "run")
    try:
        return from_dict(apply_overrides(data, overrides), source=str(path))
    except ConfigError as error:
        if not overrides:
            raise
        raise ConfigError(_to_blame(path, data, overrides), error.errors) from None


def _file_of(name_or_path: str) -> Path:
    """The YAML file of an experiment. Raises ConfigError, with a suggestion, if there is none, and
    OSError for what can be no name."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in name_or_path:
        what = (
            f"{name_or_path} is a folder" if path.is_dir() else f"there is no file {name_or_path}"
        )
        meant = _meant(path.stem) if len(path.parts) == 1 else ""
        raise ConfigError("", [f"{what}{meant}"])
    shipped = EXPERIMENTS / f"{name_or_path}.yaml"
    if not shipped.is_file():
        raise ConfigError(
            "",
            [
                f"there is no experiment {name_or_path!r}{_meant(name_or_path)}\n"
                "`maml config list` shows those that are shipped; one of your own is a YAML file"
            ],
        )
    return shipped


def _meant(name: str) -> str:
    """The question '; did you mean NAME?' about a name where there is no experiment, or ''.

    It names all experiments of a family, such as `omniglot`, else the one most alike.
    """
    names = experiments()
    family = [each for each in names if name not in names and each.startswith(f"{name}-")]
    close = family or difflib.get_close_matches(name, names, 1)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _to_blame(path: Path, data: dict[str, Any], overrides: Sequence[str]) -> str:
    """The text that names what to mend: the overrides, and the file if it is wrong without them."""
    given = " ".join(map(cut, overrides))
    try:
        from_dict(data)
    except ConfigError:
        return f"{path} with {given}"
    return given


def load_run(run_dir: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read the experiment of a run's folder, with overrides. Raises ConfigError."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        there = "it is a file" if run_dir.exists() else "there is no such folder"
        why = f"it has no {path.name}" if run_dir.is_dir() else there
        raise ConfigError("", [f"{run_dir} is not the folder of a run: {why}"])
    return load(str(path), overrides)


# What may change when a run is continued: none of it changes what has been computed so far.
_RESUMABLE = (
    "description",
    "outer.iterations",
    "cluster.",
    "evaluation.",
    "diagnostics.",
    "tracking.",
    "checkpoint.",
    "data.",
)


def load_to_resume(run_dir: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read the experiment of a run that is to be continued. Raises ConfigError.

    The run's own configuration counts; overrides may change how long it goes on and everything
    that does not touch its results.
    """
    refuse_names(overrides, str(run_dir))
    before = load_run(run_dir)
    after = load_run(run_dir, overrides)
    refuse_changes(before, after, "the overrides")
    return after


def refuse_names(overrides: Sequence[str], source: str) -> None:
    """Raise ConfigError for a word that is no override, where `source` says which run goes on."""
    for word in overrides:
        if "=" not in word:
            raise ConfigError("", [f"{word}: {source} says which experiment goes on; leave it out"])


def refuse_changes(before: Experiment, after: Experiment, source: str) -> None:
    """Raise ConfigError for settings that a run cannot change when it is continued.

    `source` is where the settings of `after` come from.
    """
    errors = [
        f"{path}: was {was!r}; a resumed run cannot change it to {now!r}"
        for path, was, now in changes(before, after)
        if not path.startswith(_RESUMABLE)
    ]
    if errors:
        raise ConfigError(source, errors)


def changes(before: Experiment, after: Experiment) -> list[tuple[str, Any, Any]]:
    """The settings that differ: their paths, and their values before and after."""
    was, now = before.flat(), after.flat()
    return [
        (path, was.get(path), now.get(path))
        for path in sorted({*was, *now})
        if was.get(path) != now.get(path)
    ]


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with every `path=value` set; values are read as YAML. Raises ConfigError."""
    data = _copied(data)
    errors = []
    # The algorithm first: it takes back what another one has set.
    for override in sorted(overrides, key=lambda o: not o.startswith("algorithm=")):
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            errors.append(f"override {shown(override)}: must look like inner.lr=0.1")
            continue
        try:
            value = read(text)
        except yaml.YAMLError as error:
            why = getattr(error, "problem", None) or str(error)
            errors.append(f"override {shown(override)}: the value is not YAML: {why}")
            continue
        _set(data, keys, value)
    if errors:
        raise ConfigError("the overrides", errors)
    return data


def with_settings(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """A copy of the experiment with settings changed by their paths, all of it checked again.

    Raises ConfigError.
    """
    data = experiment.plain()
    for path, value in sorted(settings.items(), key=lambda item: item[0] != "algorithm"):
        _set(data, path.split("."), value)
    return from_dict(data, source=", ".join(f"{path}={value}" for path, value in settings.items()))


def from_dict(data: dict[str, Any], source: str = "the configuration") -> Experiment:
    """The experiment of plain values. Raises ConfigError; `source` is what its errors are in."""
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        raise ConfigError(source, readable(error.errors())) from None


def absolute_path(path: str | Path) -> Path:
    """A path as a person gives it, with `~` and from the current folder, made absolute."""
    return Path(path).expanduser().absolute()


def runs_folder() -> Path:
    """The absolute folder of runs that name no `run_dir`."""
    return absolute_path(os.environ.get(RUNS) or "runs")


def json_schema() -> dict[str, Any]:
    """The JSON schema of an experiment, the settings of the built-in kinds included."""
    schema = Experiment.model_json_schema()
    for section in ("task", "model"):
        schema["properties"][section] = {
            "anyOf": [
                *(component_schema(section, kind) for kind in kinds(section)),
                {
                    "type": "object",
                    "properties": {"kind": {"type": "string", "pattern": "^[\\w.]+:\\w+$"}},
                    "required": ["kind"],
                    "title": "your own, by dotted path",
                },
            ]
        }
    return schema


def _set(data: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Put a value where the keys lead to, in place."""
    node = data
    for key in keys[:-1]:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    # Another kind has other settings: those of the kind in the file do not apply to it.
    if keys[-1] == "kind" and node.get("kind") != value:
        node.clear()
    if list(keys) == ["algorithm"]:
        choose(data, value)
    if list(keys) == ["inner", "order"] and value != "annealed":
        node.pop("second_order_from", None)
    node[keys[-1]] = value


def _copied(value: Any) -> Any:
    """A copy of nested mappings; their other values are shared."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return value
