"""A cluster of several machines (tests/machines.py), of which some get lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.training.loop import train
from tests.conftest import experiment_of
from tests.helpers import final_theta
from tests.machines import Machine, Machines, machines, start_head, start_node
from tests.waiting import wait_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Machine]]:
    """A head, where nothing is computed, and two nodes."""
    with machines(tmp_path_factory.mktemp("machines")) as made:
        yield started(made, nodes=2)


def started(made: Machines, *, nodes: int) -> list[Machine]:
    every = [made.add() for _ in range(1 + nodes)]
    start_head(every[0])
    for node in every[1:]:
        start_node(node)
    return every


def settings_of(quick: dict[str, Any], address: str) -> dict[str, Any]:
    """Two actors per node, and time to lose some."""
    return {
        **quick,
        "task": {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.01},
        "outer": {**quick["outer"], "iterations": 30, "tasks_per_batch": 8, "tasks_per_chunk": 1},
        "cluster": {"workers": 4, "address": f"{address}:6379", "chunk_timeout": 3.0},
    }


def started_run(machine: Machine, settings: dict[str, Any]) -> subprocess.Popen[str]:
    """`maml train` on a machine, into the folder `run` of its home."""
    (machine.home / "mine.yaml").write_text(yaml.safe_dump(settings))
    command = ("maml", "train", "mine.yaml", "run_dir=run")
    return machine.start(*command, output=machine.home / "output.txt")


def iterations(machine: Machine) -> int:
    """How many are on record."""
    records = machine.home / "run" / "metrics.jsonl"
    return len(records.read_text().splitlines()) if records.exists() else 0


def ended_well(run: subprocess.Popen[str], machine: Machine) -> str:
    """What the run printed."""
    code = run.wait(240)
    text = (machine.home / "output.txt").read_text()
    assert code == 0, text
    return text


def test_a_node_that_is_cut_off_and_then_lost(
    cluster: list[Machine], quick: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing on it ends, but nobody hears it, and then it is there again; later all on it ends,
    and nobody says so. The run goes on each time, and its bits are those of a calm one."""
    head, _, node = cluster
    settings = settings_of(quick, head.address)
    run = started_run(head, settings)

    def goes_on() -> None:
        before = iterations(head)
        wait_for(lambda: iterations(head) > before + 3 or run.poll() is not None)

    wait_for(lambda: iterations(head) > 2 or run.poll() is not None)
    node.cut_off()
    goes_on()
    node.join_again()
    goes_on()
    node.lose()
    goes_on()
    text = ended_well(run, head)
    assert "4 Ray actors" in text
    assert text.count("has not answered") + text.count("was lost") >= 2
    calm = {**settings, "cluster": {"workers": 0}}
    train(experiment_of(calm), tmp_path / "calm")
    assert torch.equal(final_theta(head.home / "run"), final_theta(tmp_path / "calm"))
