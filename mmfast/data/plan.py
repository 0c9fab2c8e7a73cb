"""Which samples make up step s: a pure function of (seed, step), in memory of one batch.

An epoch's order is a permutation computed element by element (a Feistel network over splitmix64, walked
until it lands inside the epoch), so a plan over 10^9 samples costs what one over 10 does, and no library's
generator can change it from one version to the next.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmfast.errors import UserError

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
_ROUNDS = 6


def bits(*key: Ints | Words | int) -> Words:
    """64 random bits for each element of the broadcast integer ``key``: splitmix64 chained over its words."""
    state = np.zeros(1, np.uint64)
    for word in key:
        state = state + (np.atleast_1d(np.asarray(word)).astype(np.uint64) ^ np.uint64(0x9E3779B97F4A7C15))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def uniform(*key: Ints | Words | int) -> NDArray[np.float64]:
    """Random numbers in [0, 1), one for each element of the broadcast ``key``."""
    return (bits(*key) >> np.uint64(11)) * 2.0**-53


def permute(index: Ints, size: int, seed: int, epoch: Ints) -> Ints:
    """Where the permutation of ``range(size)`` keyed by (seed, epoch) sends each ``index``; all [n]."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))  # two halves of this many bits
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = bits(seed, epoch)
    x = index.astype(np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> half, x[todo] & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (bits(key[todo], turn, right) & mask)
        x[todo] = (left << half) | right
        todo = todo[x[todo] >= size]  # outside: go on along the cycle, which leads back inside
    return x.astype(np.int64)


@dataclass(frozen=True)
class Plan:
    """The endless order of training: step s takes positions [s * batch_size, (s + 1) * batch_size).

    Position p is sample p % num_samples of the order of epoch p // num_samples: the last, partial batch of an
    epoch is filled up with the first samples of the next; none is lost or doubled within an epoch.
    """

    num_samples: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.num_samples < 1:
            raise UserError("a plan needs samples: got an empty split")
        if self.batch_size < 1:
            raise UserError(f"batch_size: got {self.batch_size}, wanted at least 1")

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every sample was seen once."""
        return -(-self.num_samples // self.batch_size)

    def epoch_of(self, step: int) -> int:
        """Epoch of the step's first sample."""
        return step * self.batch_size // self.num_samples

    def epochs(self, step: int) -> Ints:
        """Epoch of each sample of the step, [batch_size]."""
        return self._positions(step) // self.num_samples

    def samples(self, step: int) -> Ints:
        """Samples of the step, over all ranks, [batch_size]."""
        epoch, index = np.divmod(self._positions(step), self.num_samples)
        return permute(index, self.num_samples, self.seed, epoch)

    def _positions(self, step: int) -> Ints:
        start = step * self.batch_size
        return np.arange(start, start + self.batch_size, dtype=np.int64)


@dataclass(frozen=True)
class InOrder:
    """The one pass of evaluation: every sample once, in order; the last batch is filled up with -1."""

    num_samples: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the pass."""
        return -(-self.num_samples // self.batch_size)

    def epochs(self, step: int) -> Ints:
        """Always epoch 0, [batch_size]."""
        return np.zeros(self.batch_size, np.int64)

    def samples(self, step: int) -> Ints:
        """Samples of the step, over all ranks, [batch_size]; -1 beyond the last."""
        ids = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        return np.where(ids < self.num_samples, ids, -1)
