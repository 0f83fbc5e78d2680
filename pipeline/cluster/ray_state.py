"""What Ray knows of nodes, actors and processes, and tells nobody in a documented way.

All that the project takes from Ray's private modules is here; Ray's dashboard and Ray Serve read
the same. `ray` must be initialised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def free_resources() -> list[Mapping[str, float]]:
    """Of every node that is alive: what nobody holds, by Ray's names."""
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


def resources_to_grow_to() -> Mapping[str, float]:
    """All that a cluster with an autoscaler may have in the end; nothing where there is none."""
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}


def leaving_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away, such as a spot instance with a notice."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def restarts_of(actor: Any) -> int:
    """How often Ray has started an actor's process anew."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import ActorTableData

    found = state.get_actor_info(actor._actor_id)
    return int(ActorTableData.FromString(found).num_restarts) if found else 0


def exit_of(pid: int, node: str) -> str:
    """Why a process of a node has ended, in Ray's words; '' as long as Ray does not know."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import WorkerTableData

    for raw in state._connect_and_get_accessor().get_worker_table():
        worker = WorkerTableData.FromString(raw)
        if worker.pid == pid and worker.worker_address.node_id.hex() == node:
            detail: str = worker.exit_detail
            # What follows is a list of what may have happened.
            return detail.partition(" Some common causes")[0].strip()
    return ""
