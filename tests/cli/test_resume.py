"""`maml train --resume`, after a driver was killed or its terminal has gone."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.runs.checkpoint import CheckpointStore
from tests.commands import clean_environment, maml
from tests.helpers import final_theta
from tests.object_store import object_store
from tests.waiting import wait_for

pytestmark = pytest.mark.long


@pytest.fixture
def slow_file(quick: dict[str, Any], tmp_path: Path) -> Path:
    """Ten thousand iterations of a hundredth of a second."""
    quick["task"] = {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.002}
    quick["outer"]["iterations"] = 10_000
    quick["outer"]["tasks_per_batch"] = 4
    quick["tracking"]["every"] = 1
    path = tmp_path / "slow.yaml"
    path.write_text(yaml.safe_dump({**quick, "name": "slow"}))
    return path


def start(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.cli", "train", *arguments]
    return subprocess.Popen(command, cwd=folder, env=clean_environment(), **options)


def the_run(folder: Path) -> Path:
    """The only run below a folder."""
    (run,) = (folder / "runs").glob("slow-*")
    return run


def test_a_run_that_is_killed_while_it_starts_begins_again(slow_file: Path, tmp_path: Path) -> None:
    """`--resume auto` begins, is killed before the first checkpoint, and begins again in the same
    folder; then there is nothing left to go on with."""
    command = ["slow.yaml", "--resume", "auto", "outer.iterations=4"]
    killed = start(tmp_path, *command, "cluster.workers=2", stdout=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob("runs/*/config.yaml")) or killed.poll() is not None)
    killed.kill()
    killed.wait()
    run = the_run(tmp_path)
    assert CheckpointStore(run / "checkpoints", keep=2).list() == (), "killed too late"
    again = maml("train", *command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert the_run(tmp_path) == run
    assert (run / "results.json").exists()
    after = maml("train", *command, cwd=tmp_path)
    assert after.returncode == 0, after.stderr
    assert len(list((tmp_path / "runs").glob("slow-*"))) == 2


def test_a_second_resume_is_told_who_has_the_run(slow_file: Path, tmp_path: Path) -> None:
    """And once that one is killed, the next one goes on, without the YAML file."""
    first = start(tmp_path, "slow.yaml", stdout=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob("runs/*/metrics.jsonl")) or first.poll() is not None)
    run = the_run(tmp_path)
    try:
        for arguments in (["--resume", str(run)], ["slow.yaml", "--resume", "auto"]):
            second = maml("train", *arguments, cwd=tmp_path)
            assert second.returncode == 2
            assert f"is in use by process {first.pid} on " in second.stderr
            assert "Traceback" not in second.stderr
            assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    slow_file.unlink()
    reached = len((run / "metrics.jsonl").read_text().splitlines())
    more = maml("train", "--resume", str(run), f"outer.iterations={reached + 5}", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    iterations = [line["iteration"] for line in recorded if "tasks_per_second" in line]
    assert iterations == list(range(1, reached + 6)), "each once"


def test_a_terminal_that_goes_away_leaves_a_checkpoint(slow_file: Path, tmp_path: Path) -> None:
    """Closing a terminal sends SIGHUP, and writing to it is an error from then on."""
    ours, theirs = pty.openpty()

    def in_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    places = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = start(tmp_path, "slow.yaml", preexec_fn=in_the_terminal, close_fds=True, **places)
    os.close(theirs)
    try:
        wait_for(lambda: list(tmp_path.glob("runs/*/metrics.jsonl")) or process.poll() is not None)
        os.close(ours)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    state = CheckpointStore(the_run(tmp_path) / "checkpoints", keep=2).latest()
    assert state is not None
    assert state.iteration >= 1


def test_nohup_is_respected(slow_file: Path, tmp_path: Path) -> None:
    process = start(
        tmp_path,
        "slow.yaml",
        "outer.iterations=60",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: list(tmp_path.glob("runs/*/metrics.jsonl")) or process.poll() is not None)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0


def test_a_run_whose_machine_is_gone_goes_on_elsewhere(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    """From its checkpoints in an object store alone; to the same parameters and records."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    quick["outer"]["iterations"] = 30
    quick["tracking"]["every"] = 1
    quick["checkpoint"] = {"every": 4}
    (here / "quick.yaml").write_text(yaml.safe_dump(quick))
    whole = maml("train", "quick.yaml", "run_dir=whole", cwd=here)
    assert whole.returncode == 0, whole.stderr
    with object_store() as store:
        uri, environment = store.uri("runs/one"), store.environment
        ended = maml(
            "train",
            "quick.yaml",
            f"checkpoint.uri={uri}",
            "outer.iterations=10",
            cwd=here,
            **environment,
        )
        assert ended.returncode == 0, ended.stderr
        nothing = maml("train", "--resume", store.uri("runs/two"), cwd=there, **environment)
        assert (nothing.returncode, list(there.iterdir())) == (2, [])
        assert "holds no checkpoint to resume from" in nothing.stderr
        other = ["--resume", uri, "inner.lr=0.5"]
        refused = maml("train", *other, cwd=there, **environment)
        assert (refused.returncode, list(there.iterdir())) == (2, [])
        assert "inner.lr: was 0.01; a resumed run cannot change it to 0.5" in refused.stderr
        before = (here / "whole" / "config.yaml").read_text()
        taken = ["--resume", uri, f"run_dir={here / 'whole'}"]
        refused = maml("train", *taken, cwd=there, **environment)
        assert refused.returncode == 2
        assert "already holds a run" in refused.stderr
        assert (here / "whole" / "config.yaml").read_text() == before
        resumed = maml("train", "--resume", uri, "outer.iterations=30", cwd=there, **environment)
    assert resumed.returncode == 0, resumed.stderr
    (run,) = (there / "runs").glob("quick-*")
    assert torch.equal(final_theta(run), final_theta(here / "whole"))
    assert query_losses(run) == query_losses(here / "whole")


def query_losses(run: Path) -> list[tuple[int, float]]:
    """What was recorded, by iteration."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["iteration"], r["train/query_loss"]) for r in records if "train/query_loss" in r]
