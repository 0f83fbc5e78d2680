"""A running Ray cluster, as a Ray job finds it: RAY_ADDRESS is set and resources are not ours."""

from __future__ import annotations

import re
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


RELAYS = """
import os, signal
from pathlib import Path
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from pipeline.config.loading import load
from pipeline.training.session import Watcher
from pipeline.training.loop import train

def main():
    store = {"include_dashboard": False, "object_store_memory": 150 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **store})
    for _ in range(2):
        cluster.add_node(num_cpus=2, **store)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address

    class Killer(Watcher):
        def started(self, session):
            self.workers = session.workers
            self.all = self.workers._roster.workers
            while not all(worker.at_home for worker in self.all.values()):
                self.workers._wait()
            print("relays", len(list(self.workers._nodes)))
            print("on nodes", len({worker.node for worker in self.all.values()}))
        def iteration(self, iteration, metrics):
            if iteration == 2:
                ray.kill(self.all[0].home.handle)
            if iteration == 3:
                os.kill(self.workers.pids()[0], signal.SIGKILL)
            if iteration == 4:
                reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
                client = GcsClient(address=cluster.address)
                client.drain_node(self.all[3].node, reason, "a spot instance's notice", 0)
        def notice(self, message):
            print(message)

    train(load("experiment.yaml"), Path("run").absolute(), watcher=Killer())
    cluster.shutdown()

if __name__ == "__main__":
    main()
"""


def ran(script: str, settings: dict[str, Any], folder: Path) -> str:
    """What a script prints that trains an experiment in a cluster of its own."""
    (folder / "experiment.yaml").write_text(yaml.safe_dump(settings))
    (folder / "driver.py").write_text(script)
    environment = clean_environment()
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "driver.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_node_is_lost(quick: dict[str, Any], tmp_path: Path) -> None:
    """Two nodes, `auto` workers; one node dies with its worker. θ is that of a calm run."""
    settings = {**quick, "task": {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.01}}
    settings["cluster"] = {"workers": "auto", "cpus_per_worker": 1}
    printed = ran(DRIVER, settings, tmp_path)
    assert "workers 2" in printed
    assert "there is room for 2" in printed
    train(experiment_of({**settings, "cluster": quick["cluster"]}), tmp_path / "calm")
    assert torch.equal(final_theta(tmp_path / "calm"), final_theta(tmp_path / "run"))


def test_nodes_add_up_what_their_workers_found(quick: dict[str, Any], tmp_path: Path) -> None:
    """Two nodes of two workers, each with a relay. A relay dies, a worker dies, and a node is told
    to go: the same θ."""
    settings = {**quick, "task": {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.02}}
    settings["model"] = {"kind": "mlp", "hidden": [120, 120]}  # worth a relay
    settings["outer"] = {**quick["outer"], "tasks_per_batch": 8, "tasks_per_chunk": 1}
    settings["cluster"] = {"workers": 4, "cpus_per_worker": 1, "spread": True}
    printed = ran(RELAYS, settings, tmp_path)
    assert "relays 2" in printed
    assert "on nodes 2" in printed
    assert "the relay of a node was lost" in printed
    assert re.search(r"worker \d \(process \d+\) was lost", printed)
    assert "is about to be taken away" in printed
    train(experiment_of({**settings, "cluster": quick["cluster"]}), tmp_path / "calm")
    assert torch.equal(final_theta(tmp_path / "calm"), final_theta(tmp_path / "run"))
