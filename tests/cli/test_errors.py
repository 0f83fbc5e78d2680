"""Every error of the packages that is meant for a person carries its exit code."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from pipeline.cli.clear_errors import ClearCommand, ClearGroup, ClearTyper
from pipeline.cli.console import LiveLine
from pipeline.cli.exit_codes import _described
from pipeline.cli.main import app
from pipeline.cli.resumable import resumable
from pipeline.training.endings import Interrupted
from tasks.errors import ReportedError, first_line
from tests.places import ROOT

EXIT_CODES = {
    "CheckpointError": 2,
    "ConfigError": 2,
    "Diverged": 1,
    "HeadLost": 1,
    "Interrupted": 130,
    "JobError": 2,
    "RunFolderError": 2,
    "StoreError": 2,
    "TrackingError": 2,
    "TrainingFailed": 1,
    "WorkersLost": 1,
    "WriteError": 2,
}
# Part of a ConfigError; an actor's answer to the driver, which sends the vector again.
INTERNAL = {"ComponentError", "StaleVector"}


def errors() -> dict[str, type[Exception]]:
    """The classes of errors that pipeline/ and tasks/ define, by name."""
    found = {}
    for folder in ("pipeline", "tasks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if not isinstance(node, ast.ClassDef) or path.name == "mlflow_model.py":
                    continue
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                value = getattr(importlib.import_module(module), node.name)
                if issubclass(value, Exception):
                    found[node.name] = value
    return found


def test_every_error_says_its_exit_code() -> None:
    found = errors()
    assert set(found) == {*EXIT_CODES, *INTERNAL, "ReportedError"}
    for name, code in EXIT_CODES.items():
        assert issubclass(found[name], ReportedError), name
        assert found[name].exit_code == code, name


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("task: no"), ("task: no", 2)),
        (KeyError("lost"), ("KeyError: 'lost' (--debug shows where)", 1)),
        (ReportedError("data: gone"), ("data: gone", 2)),
    ],
)
def test_other_errors(error: Exception, expected: tuple[str, int]) -> None:
    assert _described(error) == expected


@pytest.mark.parametrize(
    ("resumed", "message"),
    [
        (False, "interrupted: nothing was trained yet"),
        (True, "interrupted: it had not gone on yet"),
    ],
)
def test_an_interruption_before_the_start(resumed: bool, message: str) -> None:
    """There is nothing to be continued that was not there before."""
    with (
        pytest.raises(Interrupted, match=f"^{message}$") as caught,
        resumable(LiveLine(1, 1), "maml train x --resume y", resumed),
    ):
        raise KeyboardInterrupt
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("\n  no such table: runs\n  at line 3"), "no such table: runs"),
        (TimeoutError(), "TimeoutError"),
        (OSError("x" * 1000), "x" * 300),
    ],
)
def test_the_first_line_of_a_message(error: Exception, expected: str) -> None:
    assert first_line(error) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("evaluate", "--split", "validatoin"), "'test'; did you mean validation?"),
        (("analyze", "--checkpoint", "bets"), "'best'; did you mean best?"),
        (("compare", "--split", "exam"), "'exam' is not one of 'train', 'validation', 'test'."),
        (("evaluate", "--tasks", "1"), "greater than or equal to 2"),
        (("runs", "--limit", "0"), "greater than or equal to 1"),
        (("runs", "--limt", "3"), "--limit"),
        (("runs", "compare", "--jsn"), "--json"),
        (("jobs", "--adress", "x"), "--address"),
        (("jobs", "logs", "--folow"), "--follow"),
        (("data", "prepare", "glyphs", "--classes", "3"), "greater than or equal to 10"),
        (("data", "prepare", "images", "--sise", "28"), "--size"),
        (("config", "show", "--hepl"), "--help"),
    ],
)
def test_a_mistyped_option_is_told_in_plain_words(
    arguments: tuple[str, ...], expected: str
) -> None:
    done = CliRunner().invoke(
        app, [*arguments, "RUN"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    )
    assert done.exit_code == 2
    assert expected in " ".join(done.stderr.replace("│", " ").split())
    assert "Value error" not in done.stderr


def test_every_command_and_group_is_clear_about_its_options() -> None:
    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield name, command
        for each, inner in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {each}", inner)

    found = dict(walk("maml", typer.main.get_command(app)))
    assert {"maml train", "maml runs", "maml data prepare images", "maml jobs stop"} <= set(found)
    for name, command in found.items():
        assert isinstance(command, ClearCommand | ClearGroup), name


@pytest.mark.parametrize("place", [("group",), ("group", "command"), ("command",)])
@pytest.mark.parametrize(
    ("given", "expected"),
    [("finsihed", "'failed'; did you mean finished?"), ("x", "'x' is not one of 'finished', ")],
)
def test_a_mistyped_choice_is_refused_in_the_same_words_everywhere(
    place: tuple[str, ...], given: str, expected: str
) -> None:
    def command(status: Literal["finished", "failed"] = "failed") -> None: ...

    whole, group = ClearTyper(), ClearTyper()
    whole.add_typer(group, name="group")
    group.callback(invoke_without_command=True)(command)
    for each in (whole, group):
        each.command("command")(command)
    done = CliRunner().invoke(whole, [*place, "--status", given], env={"TERMINAL_WIDTH": "200"})
    assert done.exit_code == 2
    assert expected in done.stderr
    assert "Value error" not in done.stderr
