"""What `task.kind` and `model.kind` name: built-in kinds, or a user's own by dotted path.

The settings of a component are the keyword parameters of its constructor (tasks) or builder
(models), so a component is declared once, in its own file, and checked here from its annotations.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model, field_validator

from pipeline.config.section import truth_is_no_number
from pipeline.config.wording import shown
from tasks.base import TaskDistribution

_KINDS = {
    "task": {
        "sinusoid": "tasks.sinusoid:Sinusoid",
        "quadratic": "tasks.quadratic:Quadratic",
        "glyphs": "tasks.glyphs:Glyphs",
        "omniglot": "tasks.omniglot:Omniglot",
        "image-folder": "tasks.image_folder:ImageFolder",
        "navigation": "tasks.control.navigation:Navigation",
        "cheetah-direction": "tasks.control.mujoco:CheetahDirection",
        "cheetah-velocity": "tasks.control.mujoco:CheetahVelocity",
        "ant-direction": "tasks.control.mujoco:AntDirection",
        "ant-velocity": "tasks.control.mujoco:AntVelocity",
        "gymnasium": "tasks.control.gym:Gymnasium",
    },
    "model": {
        "linear": "pipeline.maml.models:linear",
        "mlp": "pipeline.maml.models:mlp",
        "conv4": "pipeline.maml.models:conv4",
        "gaussian-policy": "pipeline.rl.policies:gaussian_policy",
        "categorical-policy": "pipeline.rl.policies:categorical_policy",
    },
}
POLICIES = {"continuous": "gaussian-policy", "discrete": "categorical-policy"}
"""The built-in model for reinforcement learning tasks, by the kind of their actions."""
_LARGEST = 1_000_000_000  # parameters
# Parameters that the pipeline fills in, so that they are no settings.
_SUPPLIED = {"self", "data_root", "input_shape", "output_size"}


class ComponentError(Exception):
    """A kind or settings that are wrong; `errors` has one message per field."""

    def __init__(self, errors: list[str]):
        self.errors = errors
        super().__init__("\n".join(errors))


def kinds(section: str) -> list[str]:
    """The built-in kinds of `task` or `model`."""
    return list(_KINDS[section])


def resolve(section: str, kind: str) -> Callable[..., Any]:
    """Import the class or function that a kind names. Raises ComponentError."""
    path = _KINDS[section].get(kind, kind)
    module_name, colon, attribute = path.partition(":")
    if not colon:
        raise ComponentError(
            [
                f"{section}.kind: {kind!r} is none of {', '.join(kinds(section))}, "
                "nor a dotted path like my_package.my_module:MyTasks"
            ]
        )
    # A console script does not look into the folder it is started in; a user's module is there.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ComponentError([f"{section}.kind: cannot import {path}: {error}"]) from error
    if section == "task" and not (inspect.isclass(target) and issubclass(target, TaskDistribution)):
        raise ComponentError(
            [f"task.kind: {path} is not a subclass of tasks.base.TaskDistribution"]
        )
    if not callable(target):
        raise ComponentError([f"{section}.kind: {path} cannot be called"])
    return cast(Callable[..., Any], target)


@cache
def _settings_model(target: Callable[..., Any]) -> type[BaseModel]:
    """Make a pydantic model whose fields are the parameters of a constructor or builder."""
    signature = inspect.signature(target)
    function = target.__init__ if inspect.isclass(target) else target
    hints = get_type_hints(function)
    if inspect.isclass(target):
        hints = {**get_type_hints(target), **hints}
    fields: dict[str, Any] = {}
    extra: Any = "forbid"
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif name not in _SUPPLIED and parameter.kind is not parameter.VAR_POSITIONAL:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (hints.get(name, Any), default)
    return create_model(
        getattr(target, "__name__", "settings"),
        __config__=ConfigDict(extra=extra, allow_inf_nan=False, arbitrary_types_allowed=True),
        __validators__={"numbers": field_validator("*", mode="before")(truth_is_no_number)},
        **fields,
    )


def check_settings(
    prefix: str, kind: str, settings: dict[str, Any], section: str | None = None
) -> dict[str, Any]:
    """The settings with types checked and defaults filled in, as plain YAML values.

    `prefix` is the path of the settings in the configuration. Raises ComponentError.
    """
    model = _settings_model(resolve(section or prefix, kind))
    try:
        return model.model_validate(settings).model_dump(mode="json")
    except ValidationError as error:
        messages = []
        for e in error.errors():
            path = ".".join([prefix, *(str(part) for part in e["loc"])])
            if e["type"] == "extra_forbidden":
                known = ", ".join(model.model_fields) or "none"
                messages.append(f"{path}: unknown setting of {kind} (it has: {known})")
            elif e["type"] == "missing":
                messages.append(f"{path}: missing")
            else:
                message = e["msg"][0].lower() + e["msg"][1:]
                messages.append(f"{path}: {message}, got {shown(e['input'])}")
        raise ComponentError(messages) from None


def build_task(kind: str, settings: dict[str, Any], data_root: str) -> TaskDistribution:
    """Construct a task distribution. Raises ValueError ('shots: ...') if it refuses a setting."""
    target = resolve("task", kind)
    typed = _settings_model(target).model_validate(settings)
    arguments: dict[str, Any] = {name: getattr(typed, name) for name in settings}
    if "data_root" in inspect.signature(target).parameters:
        arguments["data_root"] = data_root
    return cast(TaskDistribution, target(**arguments))


def build_model(
    kind: str,
    settings: dict[str, Any],
    input_shape: tuple[int, ...],
    output_size: int,
    seed: int,
) -> torch.nn.Module:
    """Build a model for inputs and outputs, its initial parameters drawn from `seed`.

    A builder is `build(input_shape, output_size, *, ...) -> nn.Module`. Its parameters are
    initialised by torch's global generator, as torch's layers do; the generator's state is put back
    so that nobody else notices. Raises ValueError.
    """
    target = resolve("model", kind)
    typed = _settings_model(target).model_validate(settings)
    arguments = {name: getattr(typed, name) for name in settings}
    if kind in kinds("model"):
        with torch.device("meta"):  # without the memory
            size = sum(
                p.numel() for p in target(input_shape, output_size, **arguments).parameters()
            )
        if size > _LARGEST:
            raise ValueError(f"model: would have {size:,} parameters, at most {_LARGEST:,} work")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = target(input_shape, output_size, **arguments)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model.kind: {kind} returned {type(model).__name__}, not a torch module")
    return model


def component_schema(section: str, kind: str) -> dict[str, Any]:
    """The JSON schema of a built-in kind's section."""
    schema = _settings_model(resolve(section, kind)).model_json_schema()
    schema["properties"] = {"kind": {"const": kind}, **schema.get("properties", {})}
    schema["required"] = ["kind", *schema.get("required", [])]
    schema["title"] = kind
    return schema
