"""Random numbers that belong to a task: (seed, split, index) determines them on every machine.

The generator is SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
generators"). Number `i` of a stream is a hash of `key + i * golden`, so that one vectorised
expression draws a whole batch of tasks, and there is no state that tasks could share by mistake.

Shapes: B tasks. A `stream` is a number for each quantity of a task (amplitude, noise, ...), so that
a new quantity does not change the numbers of the others.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_R30, _R27, _R31, _R11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_ONE = np.uint64(1)
_SPLIT_CODES = {"train": 1, "validation": 2, "test": 3}


def _mix(z: UInt64) -> UInt64:
    """SplitMix64's finaliser, a bijection of 64-bit words; overwrites its argument."""
    # In place, because for small arrays most of the time goes into calls.
    z ^= z >> _R30
    z *= _FIRST
    z ^= z >> _R27
    z *= _SECOND
    z ^= z >> _R31
    return z


@lru_cache(maxsize=1024)
def _split_key(seed: int, split: str) -> UInt64:
    """The key from which those of all tasks of a split are derived, [1]."""
    if split not in _SPLIT_CODES:
        raise ValueError(f"split: {split!r} is not one of {', '.join(_SPLIT_CODES)}")
    run = _mix(np.array([seed], dtype=np.int64).view(np.uint64) + _GOLDEN)
    return _mix(run + np.full(1, _SPLIT_CODES[split], dtype=np.uint64) * _GOLDEN)


@lru_cache(maxsize=1024)
def _stream_key(stream: int) -> UInt64:
    """The word that is mixed into the keys of a stream, [1]."""
    return _mix(np.full(1, stream + 1, dtype=np.uint64) * _GOLDEN)


@lru_cache(maxsize=64)
def _counters(count: int) -> UInt64:
    """i * golden for i = 1 .. count, [count]."""
    return np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN


def task_keys(seed: int, split: str, indices: npt.ArrayLike) -> UInt64:
    """One 64-bit key per task, [B], from the run's seed, the split's name and the task's index."""
    index = np.atleast_1d(np.asarray(indices, dtype=np.int64)).view(np.uint64)
    return _mix(_split_key(seed, split) + _GOLDEN * (index + _ONE))


def stream_keys(keys: UInt64, stream: int) -> UInt64:
    """The keys of a stream, shaped as `keys`; apply it again for streams within a stream."""
    return _mix(keys ^ _stream_key(stream))


def bits(keys: UInt64, stream: int, count: int) -> UInt64:
    """`count` uniform 64-bit words per key: [B] -> [B, count]."""
    return _mix(stream_keys(keys, stream)[..., None] + _counters(count))


def uniform(
    keys: UInt64, stream: int, count: int, low: float = 0.0, high: float = 1.0
) -> npt.NDArray[np.float64]:
    """Uniform numbers on [low, high), [B, count]."""
    words = bits(keys, stream, count)
    words >>= _R11
    unit = words.astype(np.float64)
    unit *= 2.0**-53
    unit *= high - low
    unit += low
    return unit


def normal(keys: UInt64, stream: int, count: int) -> npt.NDArray[np.float64]:
    """Standard normal numbers, [B, count] (Box-Muller)."""
    u = uniform(keys, stream, 2 * count)
    radius = np.sqrt(-2.0 * np.log1p(-u[..., :count]))
    return radius * np.cos(2.0 * np.pi * u[..., count:])


def integers(keys: UInt64, stream: int, count: int, high: int) -> npt.NDArray[np.int64]:
    """Integers on [0, high), [B, count]."""
    return (uniform(keys, stream, count) * high).astype(np.int64)


def choose(keys: UInt64, stream: int, population: int, count: int) -> npt.NDArray[np.int64]:
    """`count` different integers of [0, population) in random order, [B, count]."""
    if count > population:
        raise ValueError(f"cannot choose {count} different items out of {population}")
    tickets = bits(keys, stream, population)
    if count < population:
        # The smallest `count` tickets win; only those are sorted, for speed in large populations.
        winners = np.argpartition(tickets, count, axis=-1)[..., :count]
        order = np.argsort(np.take_along_axis(tickets, winners, axis=-1), axis=-1)
        return np.take_along_axis(winners, order, axis=-1)
    return np.argsort(tickets, axis=-1)
