"""Checkpoints in an object store: through the protocol itself, on a network that fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.runs.checkpoint import CheckpointError, CheckpointStore
from tests.object_store import Store, object_store
from tests.runs.test_checkpoint import bits, state

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store() as running:
        yield running


def test_it_is_a_checkpoint_folder_like_others(store: Store) -> None:
    checkpoints = CheckpointStore(store.uri("plain"), keep=2)
    assert checkpoints.latest() is None
    checkpoints.check_writable()
    for iteration in (1, 2, 3):
        checkpoints.save(state(iteration), best=iteration == 1)
    again = CheckpointStore(store.uri("plain"), keep=2)
    latest, best = again.latest(), again.best()
    assert latest is not None
    assert best is not None
    assert (latest.iteration, best.iteration) == (3, 1)
    assert [info.iteration for info in again.list()] == [1, 2, 3]
    assert bits(latest.tensors["theta.weight"]) == bits(state(3).tensors["theta.weight"])


@pytest.mark.parametrize("fault", ["500", "503", "slow", "cut"])
def test_a_request_that_fails_once_is_made_again(store: Store, fault: str) -> None:
    checkpoints = CheckpointStore(store.uri(fault), keep=2)
    checkpoints.save(state(1), best=False)
    store.faults.extend([fault])
    checkpoints.save(state(2), best=False)
    assert not store.faults
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.iteration == 2


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 7])
def test_a_save_that_fails_half_way_leaves_the_checkpoint_before(store: Store, after: int) -> None:
    """Whichever of its requests is refused; the next save is whole again."""
    checkpoints = CheckpointStore(store.uri(f"refused-{after}"), keep=2)
    checkpoints.save(state(1), best=False)
    store.faults.extend([""] * after + ["403"] * 20)
    with pytest.raises(CheckpointError, match=f"refused-{after}"):
        checkpoints.save(state(2), best=False)
    store.faults.clear()
    for expected in (1, 2):
        latest = checkpoints.latest()
        assert latest is not None
        assert latest.iteration == expected
        checkpoints.save(state(2), best=False)
