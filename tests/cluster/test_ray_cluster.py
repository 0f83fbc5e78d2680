"""A running Ray cluster, as a Ray job finds it: RAY_ADDRESS is set and resources are not ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.training.loop import train
from tests.commands import clean_environment
from tests.conftest import experiment_of
from tests.helpers import final_theta

# In a process of its own: a process can be connected to one Ray only.
DRIVER = """
import os, signal, sys, threading
from pathlib import Path
from ray.cluster_utils import Cluster
from pipeline.config.loading import load
from pipeline.training.session import Watcher
from pipeline.training.loop import train

def main():
    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 1, "include_dashboard": False, "object_store_memory": 150 * 2**20,
        "_system_config": {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500,
                           "health_check_failure_threshold": 2, "health_check_timeout_ms": 1000}})
    node = cluster.add_node(num_cpus=1, object_store_memory=150 * 2**20)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address

    class Killer(Watcher):
        notices = []
        def started(self, session):
            print("workers", session.workers.size)
        def iteration(self, iteration, metrics):
            if iteration == 2:
                cluster.remove_node(node, allow_graceful=False)
        def notice(self, message):
            print(message)

    train(load("experiment.yaml"), Path("run").absolute(), watcher=Killer())
    cluster.shutdown()

if __name__ == "__main__":
    main()
"""


def test_a_node_is_lost(quick: dict[str, Any], tmp_path: Path) -> None:
    """Two nodes, `auto` workers; one node dies with its worker. θ is that of a calm run."""
    settings = {**quick, "task": {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.01}}
    settings["cluster"] = {"workers": "auto", "cpus_per_worker": 1}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = clean_environment()
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "driver.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "workers 2" in done.stdout
    assert "the cluster has room for 2" in done.stdout
    train(experiment_of({**settings, "cluster": quick["cluster"]}), tmp_path / "calm")
    assert torch.equal(final_theta(tmp_path / "calm"), final_theta(tmp_path / "run"))
