"""A relay: what workers put there is added by the tree, what is gone is left out; no Ray."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from pipeline.cluster.relay import Kept, Relay, RelayActor
from pipeline.cluster.shared_vectors import SharedVectors
from pipeline.worker.tree import Span, TreeSum
from tests.places import ROOT

CHUNKS, SIZE = 4, 5
VECTORS = np.random.default_rng(0).standard_normal((CHUNKS, SIZE)).astype(np.float32)


def test_it_adds_as_everybody_does() -> None:
    relay = RelayActor(SIZE, "float32")
    kept = []
    for worker, order in enumerate(([3, 0], [2, 1])):
        theta, answers = relay.open(worker, 2)
        memory = SharedVectors.attach(answers)
        assert memory is not None
        assert SharedVectors.attach(theta) is not None
        for slot, chunk in enumerate(order):
            memory.write(slot, 10 + chunk, VECTORS[chunk])
            kept.append(Kept(worker, slot, 10 + chunk, Span(chunk, chunk + 1)))
    whole = TreeSum(CHUNKS)
    for chunk in range(CHUNKS):
        whole.add(Span(chunk, chunk + 1), VECTORS[chunk].copy())
    ((span, total),) = relay.folded(CHUNKS, kept)
    assert span == Span(0, CHUNKS)
    assert np.array_equal(total, whole.total())
    # An overwritten slot, and the memory of a worker that is no more.
    stale = kept[0]._replace(call=99)
    relay.close(1)
    assert [span for span, _ in relay.folded(CHUNKS, [stale, *kept[1:]])] == [Span(0, 1)]


def test_workers_read_what_it_was_sent() -> None:
    relay = RelayActor(SIZE, "float32")
    theta, _ = relay.open(0, 1)
    memory = SharedVectors.attach(theta)
    assert memory is not None
    relay.set(1, 7, VECTORS[0])
    assert np.array_equal(memory.awaited(1, 7), VECTORS[0])
    assert memory.holds(1, 7)
    relay.set(1, 9, VECTORS[1])
    assert not memory.holds(1, 7)


def test_sums_are_fetched_when_no_more_is_to_come() -> None:
    relay = Relay("node", handle=None)
    relay.under_way = {1, 2}
    assert not relay.due(covered=False)
    relay.kept.append(Kept(0, 0, 1, Span(0, 1)))
    assert not relay.due(covered=False)
    assert relay.due(covered=True)  # whoever is still at work was overtaken
    relay.under_way.clear()
    assert relay.due(covered=False)
    assert relay.holds(0, 0)
    assert not relay.holds(0, 1)


def test_it_needs_no_torch() -> None:
    """There is one on every node, beside the workers: it must be small."""
    code = "import sys, pipeline.cluster.relay; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
