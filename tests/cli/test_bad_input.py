"""Bad input, row by row: each ends with the field or file named, and nothing is started or left."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import maml

SECRET = "hunter2"


class Row(NamedTuple):
    """A command, what is in its folder before, and what its message says."""

    command: tuple[str, ...]
    said: str
    file: tuple[str, str | None] | None = None
    """A file in the folder: its name and content; None: a pipe that nobody writes to."""


def setting(override: str, said: str | None = None) -> Row:
    """A training with one setting that is wrong; its message names the setting, unless `said`."""
    said = said or override.partition("=")[0]
    return Row(("train", "sinusoid", "cluster.workers=0", override), said)


def schedule(name: str, argument: str, said: str) -> Row:
    """A training with a schedule that torch cannot use."""
    overrides = (f"outer.scheduler={name}", f"outer.scheduler_args={{{argument}}}")
    return Row(("train", "sinusoid", *overrides), f"outer.scheduler_args{said}")


def config(content: str, said: str) -> Row:
    """A training from a file of one's own."""
    return Row(("train", "mine.yaml"), said, ("mine.yaml", content))


SECTIONS = (
    "task: {kind: sinusoid}\nmodel: {kind: mlp}\nouter: {iterations: 3, tasks_per_batch: 2}\n"
)
SETTINGS = {
    "true is no rate": setting("inner.lr=true"),
    "true is no number of steps": setting("inner.steps=true"),
    "false is no number of workers": setting("cluster.workers=false"),
    "true is no number of shots": setting("task.shots=true"),
    "true is no width": setting("model.hidden=[true]"),
    "true is no step to report": setting("evaluation.steps=[0, true]"),
    "true is no end of a range": setting(
        "search={space: {inner.lr: {uniform: [true, 2]}}}", "uniform"
    ),
    "a rate that is no number": setting("inner.lr=.nan"),
    "an infinite rate": setting("outer.lr=.inf"),
    "a NaN for the schedule": schedule(
        "CosineAnnealingLR", "eta_min: .nan", ".eta_min: must be a finite number, got nan"
    ),
    "an infinity for the schedule": schedule("StepLR", "step_size: 1, gamma: .inf", ".gamma: must"),
    "a schedule without steps": schedule("StepLR", "step_size: 0", ": StepLR refuses them"),
    "a schedule of text": schedule("StepLR", "step_size: a", ": StepLR refuses them"),
    "a schedule of no length": schedule("CosineAnnealingLR", "T_max: 0", ": CosineAnnealingLR"),
    "a schedule with what it does not have": schedule(
        "StepLR", "step_size: 1, no_such: 1", ": StepLR refuses them"
    ),
    "a meta-batch of 21 digits": setting(f"outer.tasks_per_batch={'9' * 21}"),
    "a thousand billion shots": setting("task.shots=1000000000000", "task.shots: must be at most"),
    "a layer beyond any memory": setting("model.hidden=[10000000000]"),
    "layers beyond any memory": setting("model.hidden=[1000000, 1000000]", "parameters"),
    "a negative deviation": setting("model.init_std=-1"),
    "a number of 5,000 digits": setting(f"outer.iterations={'1' * 5000}", "5,000 digits"),
    "a billion iterations of adaptation": setting("inner.steps=1000000000"),
    "a billion workers": setting("cluster.workers=1000000000"),
    "a name of 5,000 characters": setting(f"name={'a' * 5000}", "name: "),
    "an experiment of 5,000 characters": Row(("train", "a" * 5000), "name too long"),
    "a NUL in the folder": setting('run_dir="a\\0b"', "run_dir: holds a NUL"),
    "nested brackets": setting(f"model.hidden={'[' * 5000}", "model.hidden"),
    "nested brackets, closed": setting(f"model.hidden={'[' * 900}{']' * 900}", "levels deep"),
    "a set for a list": setting("inner.adapted=!!set {head}", "'set'"),
    "bytes for text": setting("description=!!binary aGk=", "'binary'"),
    "a list for a number": setting("inner.lr=[1]"),
    "a folder for an experiment": Row(("train", "./"), "is a folder"),
    "a password of a store": setting(f"tracking.uri=postgresql://u:{SECRET}@h/db"),
    "a password of a server": setting(f"tracking.uri=http://u:{SECRET}@h:5000"),
    "a token of a server": setting(f"tracking.uri=http://{SECRET}@h:5000"),
    "keys of checkpoints": setting(f"checkpoint.uri=s3://KEY:{SECRET}/x@bucket/runs"),
    "keys of checkpoints in a query": setting(
        f"checkpoint.uri=s3://bucket/runs?access_key={SECRET}&region=x"
    ),
    "keys of data": setting(f"data.root=s3://KEY:{SECRET}@bucket/stores"),
    "a password of a cluster": setting(f"cluster.address=ray://u:{SECRET}@h:10001"),
    "a password in a tag": setting(
        f"tracking.tags={{source: 'https://u:{SECRET}@git/x'}}", "tracking.tags.source"
    ),
    "a password where a section is": setting(f"tracking=postgresql://u:{SECRET}@h/db"),
}
FILES = {
    "a section twice": config(
        SECTIONS + "inner: {lr: 0.1}\ninner: {steps: 2}\n", "the key 'inner' stands twice"
    ),
    "a setting twice": config(
        SECTIONS + "inner: {lr: 0.1, lr: 0.2}\n", "the key 'lr' stands twice"
    ),
    "an alias of what holds it": config(SECTIONS + "inner: &a {lr: *a}\n", "levels deep"),
    "a list that holds itself": config(SECTIONS + "search: &a [*a]\n", "levels deep"),
    "aliases of aliases": config(
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 9)),
        "more than 100,000 values",
    ),
    "5,000 nested brackets": config("task: " + "[" * 5000 + "]" * 5000, "levels deep"),
    "a number of 5,000 digits in a file": config(f"seed: {'1' * 5000}\n", "5,000 digits"),
    "a list for sections": config("[1, 2]\n", "must hold sections"),
    "text for sections": config("sinusoid\n", "must hold sections"),
    "nothing at all": config("", "must hold sections"),
    "no YAML": config("task: {kind: ]", "mine.yaml"),
    "no text": config("a\0b", "mine.yaml"),
    "a password in a file": config(
        SECTIONS + f"tracking: {{uri: 'mysql://u:{SECRET}@h/db'}}\n",
        "tracking.uri: holds credentials",
    ),
}
STORE = f"postgresql://u:{SECRET}@h/db"
JOB = ("--", "train", "sinusoid")
ADDRESSES = {
    "a port that is no number": Row(
        ("submit", "--address", "http://h:eight", *JOB), "--address: must be the dashboard's"
    ),
    "a port beyond all": Row(
        ("submit", "--address", "h:99999", *JOB), "--address: must be the dash"
    ),
    "a head without a host": Row(("jobs", "--address", "http://:8265"), "--address: must be the"),
    "a head with a password": Row(
        ("submit", "--address", f"http://u:{SECRET}@h:8265", *JOB), "--address: holds credentials"
    ),
    "a job with a password": Row(
        ("submit", *JOB, f"tracking.uri={STORE}"), "tracking.uri: holds credentials"
    ),
    "no job": Row(("submit", "--", "maml"), "give a command to run"),
    "a variable that is not set": Row(("submit", "--env", "NO_SUCH", *JOB), "NO_SUCH is not set"),
    "a variable without a name": Row(("submit", "--env", f"={SECRET}", *JOB), "--env: must look"),
    "runs of a store with a password": Row(("runs", "--uri", STORE), "holds credentials"),
    "pages of a store with a password": Row(("ui", "--uri", STORE), "holds credentials"),
    "a store of an unknown kind": Row(("runs", "--uri", "ftp://h/x"), "knows no stores like"),
}
PREPARE = ("data", "prepare", "images", "--name", "mine", "--source")
IMAGES = {
    "images of a pipe": Row(
        (*PREPARE, "pipe"), "pipe is neither a folder nor a file", ("pipe", None)
    ),
    "images of a device": Row((*PREPARE, "/dev/zero"), "/dev/zero is neither a folder nor a file"),
    "images of text": Row((*PREPARE, "a.zip"), "a.zip is damaged", ("a.zip", "text")),
    "images of a size beyond any memory": Row((*PREPARE, ".", "--size", "100000000"), "--size"),
    "images from nowhere": Row((*PREPARE, "nowhere"), "nowhere does not exist"),
}


class Stranger(BaseHTTPRequestHandler):
    """Somebody's web server, which answers everything with an empty object."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Not into the output of tests."""


@pytest.fixture
def stranger() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_is_not_mlflow(stranger: str, tmp_path: Path) -> None:
    for command in (("runs",), ("runs", "compare", "a", "b")):
        done = maml(*command, "--uri", stranger, cwd=tmp_path)
        assert done.returncode == 2, done.stdout
        assert f"{stranger} answers, but has not even MLflow's own experiment" in done.stderr
        assert not list(tmp_path.iterdir())


ROWS = {**SETTINGS, **FILES, **ADDRESSES, **IMAGES}


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_is_named(name: str, tmp_path: Path) -> None:
    command, said, file = ROWS[name]
    if file is not None and file[1] is None:
        os.mkfifo(tmp_path / file[0])
    elif file is not None:
        (tmp_path / file[0]).write_text(file[1])
    before = sorted(tmp_path.rglob("*"))
    done = maml(*command, cwd=tmp_path)
    shown = done.stdout + done.stderr
    assert done.returncode == 2, shown
    assert said in shown
    assert "Traceback" not in shown
    assert SECRET not in shown
    assert len(shown) < 3000, "nobody reads what a machine made"
    assert sorted(tmp_path.rglob("*")) == before
