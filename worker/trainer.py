"""Training by mini-batches, for a batch of members at once.

Members are experiments with the same shapes and the same schedule: their parameters are the rows of one array, and
data, seed, learning rate, weight decay and momentum are each member's own. What a member becomes does not depend on who
else is in the batch. The formulas are written once over an array namespace: numpy on the CPU, torch on CUDA.
Training yields; it does not write, and it measures nothing but losses. It can be stopped between any two steps, and a
checkpoint goes on from there in another process.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from service.lowrank.ranks import Array
from service.schemas import ExperimentSpec
from service.sweeps import shared
from worker.backpropagation import Backpropagation, Forward, ForwardOf
from worker.datasets import make_dataset
from worker.networks import (
    Arrays,
    Network,
    Tensor,
    as_numpy,
    initial_parameters,
    named_parameters,
)
from worker.optimizers import Update, Vectors, gradient_scale, make_update, state_names
from worker.scores import score_of

BLOCK = 2**17  # Parameters trained at a time on the CPU: they stay in its cache from step to step.
CHUNK_WORK, CHUNK_STEPS = 2**30, 4096  # About a third of a second of training, between two looks outside.
GAMMA, MIX1, MIX2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Snapshot:
    """The members at the end of an epoch; epoch 0 is before training.

    Losses and R² are (M,); NaN stands for no validation set, and in R² also for a target that does not vary. `weights`
    are live views (M, out, in): training goes on in them once the next snapshot is asked for. `diverged` (M,) marks
    the members of which a parameter or a loss is, or has been, infinite or NaN.
    """

    epoch: int
    train_loss: Array
    validation_loss: Array
    train_r2: Array
    validation_r2: Array
    weights: list[Tensor]
    diverged: NDArray[np.bool_]


class _Block(NamedTuple):
    """Members trained together: the gradient by the number of rows of a mini-batch, and the update that follows."""

    members: slice
    backpropagate: dict[int, Backpropagation]
    update: Update


class Trainer:
    """A batch of members, ready to be trained once; the parameters are live in `network`."""

    def __init__(
        self,
        members: Sequence[ExperimentSpec],
        device: str = "cpu",
        dtype: str = "float32",
        xp: ModuleType | None = None,
    ) -> None:
        """Members must share shapes and schedule. Raises ValueError."""
        check_alike(members)
        self.spec = members[0]
        self.xp, self.device = xp or (np if device == "cpu" else torch), device
        self._arrays = Arrays(self.xp, device, dtype)
        self._seeds = self.xp.asarray(np.array([[member.seed] for member in members]), device=device)
        self.step = 0
        self.diverged = np.zeros(len(members), dtype=bool)
        self._prepare_data(members)
        self._prepare_parameters(members)

    def _prepare_data(self, members: Sequence[ExperimentSpec]) -> None:
        self._inputs = self.spec.data.n_features + self.spec.network.bias
        data = [make_dataset(member, self._arrays.dtype) for member in members]
        self._training = self._rows((one.x_train, one.y_train) for one in data)
        self._validation = self._rows((one.x_validation, one.y_validation) for one in data)
        self._shuffled_rows = self.xp.empty_like(self._training)
        self._shuffled = 0  # The epoch in whose order they are.

    def _rows(self, parts: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Tensor:
        """Each member's samples as rows (M, n, …) of its inputs, a one where there are biases, and its targets."""
        bias = int(self.spec.network.bias)
        return self._arrays.stack([np.hstack((x, np.ones((len(x), bias), x.dtype), y)) for x, y in parts])

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[..., : self._inputs], rows[..., self._inputs :]

    def _prepare_parameters(self, members: Sequence[ExperimentSpec]) -> None:
        spec, arrays = self.spec, self._arrays
        self.parameters = arrays.stack([initial_parameters(member) for member in members])
        self.network = network = Network.of(self.parameters, spec)
        self._state = {name: self.xp.zeros_like(self.parameters) for name in state_names(members)}
        at_once = max(1, BLOCK // spec.parameters) if self.xp is np else len(members)
        parts = [slice(start, start + at_once) for start in range(0, len(members), at_once)]

        @functools.cache
        def forward_of(n_members: int, n_rows: int) -> Forward:
            return Forward(network[:n_members], spec.network.activation, n_rows, arrays)

        spare = [self.xp.empty_like(self.parameters[:at_once]) for _ in range(2)]
        self._blocks = [self._block(members[part], part, forward_of, spare) for part in parts]
        self._train_score = score_of(network, forward_of, *self._split(self._training), arrays)
        self._validation_score = score_of(network, forward_of, *self._split(self._validation), arrays)

    def _block(
        self, members: Sequence[ExperimentSpec], place: slice, forward_of: ForwardOf, spare: Sequence[Tensor]
    ) -> _Block:
        """Members at a place of the batch; what is spare is anybody's between two steps."""
        spec, n, network = self.spec, len(members), self.network[place]
        gradient, scratch = (vector[:n] for vector in spare)
        slopes, scales = Network.of(gradient, spec), [gradient_scale(member.training) for member in members]
        last = spec.n_training - (spec.steps_per_epoch - 1) * spec.training.batch_size
        backpropagate = {
            rows: Backpropagation(network, slopes, forward_of(n, rows), scales, self._arrays)
            for rows in {min(spec.training.batch_size, spec.n_training), last}
        }
        state = {name: vector[place] for name, vector in self._state.items()}
        vectors = Vectors(self.parameters[place], gradient, scratch, state)
        return _Block(place, backpropagate, make_update(members, vectors, self._arrays))

    def copy_weights(self) -> list[Tensor]:
        """The weights (M, out, in) as they are now, in memory of their own."""
        return [self.xp.asarray(weight, copy=True) for weight in self.network.weights]

    def state(self, member: int) -> dict[str, NDArray[Any]]:
        """A member's parameters as they are now, under PyTorch's names."""
        return named_parameters(self.network, member)

    def checkpoint(self) -> dict[str, NDArray[Any]]:
        """All that the rest of the training depends on, by name; views of what training goes on in."""
        state = {name: as_numpy(vector) for name, vector in self._live().items()}
        return {**state, "step": np.array([self.step], np.int64), "diverged": self.diverged}

    def restore(self, saved: dict[str, NDArray[Any]]) -> None:
        """Go on from a checkpoint: what follows is bit for bit what would have followed there.

        Raises ValueError where it is of other members; nothing is changed then.
        """
        expected, found = (
            {name: (array.shape, array.dtype) for name, array in state.items()} for state in (self.checkpoint(), saved)
        )
        if found != expected:
            raise ValueError(f"a checkpoint of other members: {found}, not {expected}")
        for name, vector in self._live().items():
            vector[...] = self.xp.asarray(saved[name], device=self.device)
        self.step, self.diverged = int(saved["step"][0]), saved["diverged"]

    def _live(self) -> dict[str, Tensor]:
        # Another name whenever the order within it or the meaning of the state changes: older checkpoints are refused.
        return {"layers": self.parameters, **self._state}

    def train(self, pause: Callable[[], None] = lambda: None) -> Iterator[Snapshot]:
        """Train on, and yield at every recorded epoch and when a member diverges; it ends early once all have.

        `pause` is called now and then between steps, when every epoch so far has been yielded: time for checkpoints.
        """
        recorded, length = set(self.spec.recorded_epochs), self.spec.steps_per_epoch
        if self.step == 0:
            yield from self._observe(0, recorded)
        while self.step < length * self.spec.training.epochs and not self.diverged.all():
            self._train_some()
            if self.step % length == 0:
                yield from self._observe(self.step // length, recorded)
            pause()

    def _observe(self, epoch: int, recorded: set[int]) -> Iterator[Snapshot]:
        broken = ~as_numpy(self.xp.isfinite(self.parameters).all(1))
        if epoch in recorded or (broken & ~self.diverged).any():
            snapshot = self._measure(epoch, self.diverged | broken)
            self.diverged = snapshot.diverged
            yield snapshot

    # Overflow is a result here, not an accident: members that diverge are reported, not warned about.
    @np.errstate(all="ignore")
    def _train_some(self) -> None:
        """Train to the end of the epoch, or for as many steps of it as are one piece of work.

        An epoch passes over the training data once, in an order of its own; the last batch may be short.
        """
        size, length = self.spec.training.batch_size, self.spec.steps_per_epoch
        epoch, first = divmod(self.step, length)
        if self._shuffled != epoch + 1:
            self._shuffle(epoch + 1)
        at_once = max(1, min(CHUNK_STEPS, CHUNK_WORK // (math.prod(self.parameters.shape) * size)))
        steps = range(first, min(first + at_once, length))
        for members, backpropagate, update in self._blocks:
            x, y = self._split(self._shuffled_rows[members])
            for step in steps:
                rows = slice(step * size, (step + 1) * size)
                x_batch = x[:, rows]
                backpropagate[x_batch.shape[1]](x_batch, y[:, rows])
                update(self.step + step - first + 1)
        self.step += len(steps)

    def _shuffle(self, epoch: int) -> None:
        n_members, n_samples, n_columns = self._training.shape
        order = shuffled_order(self.xp, self._seeds, epoch, n_samples)
        order += n_samples * self.xp.arange(n_members, device=self.device)[:, None]
        rows, shuffled = (samples.reshape(-1, n_columns) for samples in (self._training, self._shuffled_rows))
        self._arrays.take(rows, order.ravel(), out=shuffled)
        self._shuffled = epoch

    @np.errstate(all="ignore")
    def _measure(self, epoch: int, diverged: NDArray[np.bool_]) -> Snapshot:
        train_loss, train_r2 = self._train_score()
        validation_loss, validation_r2 = self._validation_score()
        diverged = diverged | ~np.isfinite(train_loss)
        if self.spec.n_validation:
            diverged = diverged | ~np.isfinite(validation_loss)
        weights = self.network.weights
        return Snapshot(epoch, train_loss, validation_loss, train_r2, validation_r2, weights, diverged)


def shuffled_order(xp: Any, seeds: Tensor, epoch: int, n: int) -> Tensor:
    """The order of n samples in an epoch, seeds (M, 1) → (M, n): a function of (seed, epoch, index) alone.

    Sample i is sorted by a hash of (seed, epoch, i), computed where the data are: the same on numpy, torch and every
    device, and no generator has to be stored in order to go on from an epoch. The hash is splitmix64 (Steele, Lea and
    Flood, 2014), started from seed and epoch, one step of γ an index: a bijection, so that no two are equal.
    """
    start = _mix(_mix(seeds) ^ epoch)
    indices = xp.arange(n, device=seeds.device)
    return xp.argsort(_mix(start + indices * GAMMA))


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser, a bijection of 64 bits; the masks make the shifts of signed numbers logical."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * MIX1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * MIX2
    return z ^ ((z >> 31) & (2**33 - 1))


def check_alike(members: Sequence[ExperimentSpec]) -> None:
    """Raise ValueError unless there are members and they share shapes and schedule."""
    if not members:
        raise ValueError("a batch needs at least one member")
    first = shared(members[0])
    for index, member in enumerate(members):
        for name, value in shared(member).items():
            if value != first[name]:
                message = f"members of a batch share shapes and schedule: {name} is {value!r} for member {index}"
                raise ValueError(f"{message}, {first[name]!r} for member 0")
