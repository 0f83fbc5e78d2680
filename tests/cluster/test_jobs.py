"""Jobs on a real Ray cluster with token authentication: submit, follow, stop, lose a node."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml

from pipeline.cluster.job_package import JobError
from pipeline.cluster.submission import (
    Head,
    default_address,
    default_name,
    job_environment,
    what_to_know,
)
from pipeline.runs.catalog import list_runs
from pipeline.runs.checkpoint import CheckpointStore
from pipeline.runs.source import source_tags
from pipeline.training.loop import train
from tests.commands import clean_environment, maml
from tests.conftest import experiment_of
from tests.helpers import final_theta, write_tiny
from tests.newcomer import SHORT
from tests.places import ROOT
from tests.ports import free_port
from tests.ray_cluster import TOKEN, Cluster, running_cluster
from tests.readme import commands

pytestmark = pytest.mark.long

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture
def slow(quick: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A training that lasts until it is stopped, with a task of the user's own, in their folder."""
    shutil.copy(ROOT / "tests" / "helpers.py", tmp_path / "mine.py")
    quick["task"] = {"kind": "mine:SlowSinusoid", "seconds": 0.01}
    quick["outer"]["iterations"] = 100_000
    quick["evaluation"]["every"] = 6
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump(quick))
    return quick


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Iterator[Start]:
    """Runs the command in the background; what still runs after the test is ended."""
    processes = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean_environment(), **cluster.client},
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Its output up to the line that holds `text`."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} is not in:\n{seen}{process.communicate()[1]}")


def test_a_job_trains_from_a_uri_and_succeeds(
    cluster: Cluster, quick: dict[str, Any], tmp_path: Path
) -> None:
    """Own folder, two actors, data by URI through the environment; the end is the job's."""
    stores, cache = cluster.home / "stores", cluster.home / "cache"
    write_tiny(stores, seed=0)
    quick["task"] = {"kind": "image-folder", "store": "tiny", "ways": 2, "queries": 2}
    quick["cluster"] = {"workers": 2, "cpus_per_worker": 0.5}
    quick["tracking"] = {"enabled": True}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(quick))
    done = maml(
        *("submit", "--follow", "--name", "first", "--env", f"MAML_STORE_CACHE={cache}"),
        *("--", "train", "mine.yaml", "seed=3"),
        cwd=tmp_path,
        **cluster.client,
        MAML_DATA_ROOT=stores.as_uri(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MLFLOW_TRACKING_URI is not set" in done.stderr
    assert "first ended with exit code 0" in done.stderr
    assert "INFO" not in done.stderr
    assert re.search(
        r"^ships \d+ files, \d\.\d MB: \*\.py and \*\.yaml outside of", done.stderr, re.M
    )
    assert "meta-test on 6 tasks" in done.stdout
    (run,) = (cluster.home / "maml-runs").glob("quick-*")
    assert str(run) in done.stdout
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["seed"], config["data"]["root"]) == (3, stores.as_uri())
    assert len(list(cache.glob("*/tiny/images.arrow"))) == 1
    (recorded,) = list_runs(f"sqlite:///{run.parent}/mlflow.db")
    assert source_tags().items() <= recorded.tags.items(), "which code it was"
    assert re.fullmatch("[0-9a-f]{64}", recorded.tags["job.package"])
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.yaml"]


def test_a_job_that_fails_gives_its_exit_code(cluster: Cluster, tmp_path: Path) -> None:
    done = maml("submit", "--follow", "--", "train", "sinusiod", cwd=tmp_path, **cluster.client)
    assert done.returncode == 2, done.stderr
    assert "there is no experiment 'sinusiod'" in done.stdout
    assert "ended with exit code 2" in done.stderr


def test_ctrl_c_leaves_the_job_and_stop_ends_it(
    cluster: Cluster, start: Start, slow: dict[str, Any], tmp_path: Path
) -> None:
    run = cluster.home / "cut"
    command = ("train", "slow.yaml", f"run_dir={run}")
    first = start("submit", "--follow", "--name", "cut", "--", *command)
    read_until(first, "validation at")
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=30)
    assert first.returncode == 130
    assert "maml jobs stop cut" in err
    assert "Traceback" not in err

    listed = maml("jobs", cwd=tmp_path, **cluster.client).stdout
    assert re.search(r"^cut +running .* maml train slow.yaml", listed, re.M)
    second = start("jobs", "logs", "cut", "--follow")
    read_until(second, "validation at")
    stopped = maml("jobs", "stop", "cut", cwd=tmp_path, **cluster.client)
    assert (stopped.returncode, stopped.stdout) == (0, "cut stopped\n"), stopped.stderr
    out, err = second.communicate(timeout=60)
    assert second.returncode == 130, err
    assert "stopped after iteration" in out, "the training had time for its checkpoint"
    assert "cut was stopped" in err
    state = CheckpointStore(run / "checkpoints", keep=2).latest()
    assert state is not None
    assert state.iteration >= 1
    assert f"stopped after iteration {state.iteration}" in out
    again = maml("jobs", "stop", "cut", cwd=tmp_path, **cluster.client)
    assert again.stdout == "cut had already ended: stopped\n"
    taken = maml("submit", "--name", "cut", "--", "config", "list", cwd=tmp_path, **cluster.client)
    assert taken.returncode == 2
    assert "there is a job cut" in taken.stderr


def test_a_node_dies_under_a_job(
    cluster: Cluster, start: Start, slow: dict[str, Any], tmp_path: Path
) -> None:
    """Three Ray nodes with an actor each; one dies while the job runs. θ is that of a calm run."""
    slow["outer"]["iterations"] = 60
    slow["cluster"] = {"workers": 3, "cpus_per_worker": 1}
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump(slow))
    doomed = [cluster.add_node(), cluster.add_node()][0]
    run = cluster.home / "hurt"
    job = start("submit", "--follow", "--", "train", "slow.yaml", f"run_dir={run}")
    read_until(job, "validation at 12")
    cluster.kill(doomed)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, out + err
    assert re.search(
        r"was lost \(.*\); its chunks are computed elsewhere, \d of 3 workers go on", out
    )
    calm = {**slow, "task": {"kind": "sinusoid"}, "cluster": {"workers": 0}}
    train(experiment_of(calm), tmp_path / "calm")
    assert torch.equal(final_theta(tmp_path / "calm"), final_theta(run))


def test_the_commands_of_the_readmes(cluster: Cluster, tmp_path: Path) -> None:
    """Those that need a cluster, in order, against this one; training cut short."""
    found = [each for each in commands() if each[0] in ("submit", "jobs")]
    assert {each[0] for each in found} == {"submit", "jobs"}
    job = ""
    for arguments in found:
        words = [cluster.address if "HEAD" in each else each for each in arguments]
        words = [job if each == "ID" else each for each in words]
        if "train" in words:
            words = [each for each in words if not each.startswith(("cluster.", "data.", "outer."))]
            words = ["sinusoid" if each == "omniglot-5w1s" else each for each in words]
            words += [*SHORT, "cluster.workers=0"]
        done = maml(*words, cwd=tmp_path, **cluster.client)
        assert done.returncode == 0, f"maml {shlex.join(words)}\n{done.stdout}{done.stderr}"
        if words[0] == "submit":
            job = re.findall(r"^job +(\S+)", done.stdout, re.M)[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RAY_AUTH_TOKEN": ""}, "wants a token, and there is none here"),
        ({"RAY_AUTH_TOKEN": "wrong"}, "refuses the token in RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=disabled here"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, "no Ray head answers"),
        ({"RAY_API_SERVER_ADDRESS": "http://no.such.host.invalid:8265"}, "no Ray head answers"),
    ],
)
def test_a_head_that_cannot_be_used_is_one_message(
    environment: dict[str, str],
    expected: str,
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**cluster.client, "HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(JobError, match=expected) as caught:
        Head(default_address())
    assert "\n" not in str(caught.value)


def test_the_command_line_shows_that_message_alone(tmp_path: Path) -> None:
    done = maml(
        *("submit", "--address", "127.0.0.1:9", "--", "config", "list"),
        cwd=tmp_path,
        RAY_ADDRESS="",
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: no Ray head answers at http://127.0.0.1:9 [^\n]+\n", done.stderr)


def test_the_token_may_be_in_a_file(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    Head(cluster.address).jobs()


@pytest.fixture
def head(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Head:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return Head(cluster.address)


def test_an_unknown_job_is_one_message(head: Head) -> None:
    for ask in (head.job, head.logs, head.stop, lambda name: head.follow(name, print)):
        with pytest.raises(JobError, match=r"^there is no job none on http://127.*`maml jobs`"):
            ask("none")


@pytest.mark.parametrize(
    ("version", "server", "expected"),
    [
        ("1.2.3", "Python/3.11", f"runs Ray 1.2.3, this machine Ray {ray.__version__}"),
        (ray.__version__, "Python/3.8", "runs Python 3.8, this machine Python 3."),
        (None, "nginx", "is not the dashboard of a Ray head"),
    ],
)
def test_a_head_of_another_version_is_refused(
    version: str | None, server: str, expected: str
) -> None:
    """A small web server plays it: another Ray cannot be installed beside this one."""

    class Answer(BaseHTTPRequestHandler):
        server_version, sys_version = server, ""

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"ray_version": version} if version else {}).encode())

        def log_message(self, *arguments: Any) -> None: ...

    with HTTPServer(("127.0.0.1", free_port()), Answer) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(JobError, match=expected):
            Head(f"127.0.0.1:{other.server_port}").check_versions()
        other.shutdown()


def test_bad_input_is_one_message(head: Head, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="--name: use letters"):
        head.submit(["config", "list"], tmp_path, "a b", {})
    with pytest.raises(JobError, match="--address: must be the dashboard's"):
        Head("ray://127.0.0.1:10001")
    done = maml("submit", "--env", "NOWHERE_SET", "--", "config", "list", cwd=tmp_path)
    assert done.returncode == 2
    assert "--env: NOWHERE_SET is not set here" in done.stderr


def test_what_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MAML_DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    assert not {"MLFLOW_TRACKING_URI", "MAML_DATA_ROOT"} & set(job_environment({}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("MAML_DATA_ROOT", "stores")
    passed = job_environment({"MAML_RUNS": "/big", "A": "b=c"})
    assert passed["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert passed["MAML_DATA_ROOT"] == str(tmp_path / "stores"), "as it is meant here"
    assert (passed["MAML_RUNS"], passed["A"]) == ("/big", "b=c")


def test_what_a_person_should_know(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    here = {"MAML_RUNS": "~/maml-runs"}

    def told(*arguments: str, **environment: str) -> str:
        return "\n".join(what_to_know(arguments, tmp_path, {**here, **environment}))

    assert len(told("train", "x").splitlines()) == 3
    assert told("evaluate", "x") == ""
    everything = ("data.root=s3://b/s", "checkpoint.uri=s3://b/c", "tracking.uri=http://mlflow")
    assert told("train", "x", *everything) == ""
    assert "same database" in told("train", "x", MLFLOW_TRACKING_URI="sqlite:////home/me/m.db")
    assert "on the head" in told("train", "x", MLFLOW_TRACKING_URI="http://localhost:5000")
    elsewhere = {"MLFLOW_TRACKING_URI": "https://mlflow", "MAML_DATA_ROOT": "s3://b/s"}
    assert len(told("train", "x", "run_dir=/efs/x", **elsewhere).splitlines()) == 0


def test_names_tell_what_a_job_does() -> None:
    assert default_name(["train", "my/own.yaml", "seed=1"]).startswith("train-my-own.yaml-20")
    assert default_name(["config", "list"]).startswith("config-list-20")
