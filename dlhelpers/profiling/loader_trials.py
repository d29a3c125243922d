"""What is the step worth with another DataLoader? Each remedy is tried on the step itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import Any

from dlhelpers.profiling.loaders import copied_dataset, random_states_kept
from dlhelpers.profiling.seen import Seen, Speedup, Trial
from dlhelpers.profiling.twins import TwinError, TwinStep, epoch_of, steps_in_a_call

__all__ = ["RACED_MS", "LoaderTrials"]

RACED_MS = 120.0  # of a step: a dozen pairs of two steps each fit into what may be spent
_EPOCH_MS = 400.0  # of an epoch, to be tried in whole
_STORED_MS = 1500.0  # for samples that are made beforehand


class LoaderTrials:
    """Trials of remedies for the loader of a step.

    Each returns how many times as fast a step is with the remedy, 1 where it brings nothing, and
    None where it could not be tried: there is no step, a stream, a sampler that cannot be begun
    once more, or a step that takes too long.

    Attributes:
        count: workers to try where there are none.
        failed: workers that were tried and could not give a batch.
        settled: whether workers were tried to the end.
        steps_of_epoch: how many steps an epoch has; 0 where that is not known.
    """

    def __init__(self, seen: Seen, speedup: Speedup) -> None:
        self.seen, self.speedup, self.failed, self.settled = seen, speedup, 0, False
        self.count = min(4, seen.cores)
        self.batches: list[Any] = []
        self.steps_of_epoch = 0
        loader = seen.loader
        if seen.step is None or loader is None or not loader.by_index:
            return
        try:
            with random_states_kept(loader):
                self.batches = epoch_of(loader)
        except Exception:  # a sampler that can be begun once
            return
        is_epoch = seen.ends >= 1 or not seen.fetches  # a step is an epoch, or more
        each = 1 if is_epoch else math.ceil(len(self.batches) / seen.fetches)
        self.steps_of_epoch = each

    def workers(self, count: int) -> float | None:
        """Try another number of workers."""
        factor = self._race({}, {"workers": count, "persistent": True}, max(count, self._own))
        self.settled |= factor is not None and count > 0
        return factor

    def persistent_workers(self) -> tuple[float | None, bool]:
        """Try workers that stay; by the steps of an epoch, or by the beginning of one alone."""
        if not self.batches:
            return None, False
        if self.steps_of_epoch * self.seen.step_ms <= _EPOCH_MS:
            return self._race({}, {"persistent": True}, self._own), True
        waits = self.seen.ms("data loading")
        saves = self._restart_ms() / self.steps_of_epoch
        saves = waits if 1.5 * saves >= waits else saves  # a bound, and its own noise with it
        return self.seen.step_ms / max(1e-9, self.seen.step_ms - saves), False

    def one_iterator(self) -> float | None:
        """Try one iterator for all steps in place of one for each."""
        return self._race(None, {"persistent": True, "single": True}, self._own)

    def plain_collate(self) -> float | None:
        """Try torch's own collate."""
        from torch.utils.data import default_collate

        return self._race({}, {"collate": default_collate}, self._own)

    def stored_samples(self, sample_ms: float) -> float | None:
        """Try samples that were made beforehand and lie in memory."""
        if not self.batches:
            return None
        size = len(self.batches[0])
        few = self.batches[: max(1, int(_STORED_MS / max(1e-3, size * sample_ms)))][:8]
        made: dict[Any, Any] = {}
        try:
            with random_states_kept(self.seen.loader):
                dataset = copied_dataset(self.seen.loader.dataset)
                for index in (index for batch in few for index in batch):
                    if index not in made:
                        made[index] = dataset[index]
        except Exception:
            return None
        return self._race({}, {"dataset": _Stored(made)}, self._own, few)

    def note_no_gain(self, remedy: str) -> None:
        """Note that a remedy brought nothing."""
        self.seen.tried.append(remedy)

    @property
    def _own(self) -> int:
        return self.seen.loader.workers if self.seen.loader else 0

    def _race(
        self,
        before: dict[str, Any] | None,
        after: dict[str, Any],
        group: int,
        batches: list[Any] | None = None,
    ) -> float | None:
        """Race two loaders under the step; ``before`` None is the program's own loader."""
        seen, loader = self.seen, self.seen.loader
        if not self.batches or seen.step is None or loader is None:
            return None
        count = steps_in_a_call(seen.step_ms, self.steps_of_epoch, max(1, group), _EPOCH_MS)
        if count * seen.step_ms > max(_EPOCH_MS, 2 * RACED_MS):
            return None
        as_is = {"workers": loader.workers, "persistent": loader.persistent, "count": count}
        given = batches or self.batches
        with ExitStack() as stack, random_states_kept(loader):
            try:
                first: Trial = _repeated(seen.step, count)
                if before is not None:
                    first = TwinStep(seen.step, loader, given, **as_is | before)
                    stack.callback(first.close)
                second = TwinStep(seen.step, loader, given, **as_is | after)
                stack.callback(second.close)
                for trial in (first, second):  # workers start, and begin to work ahead
                    trial()
                return max(1.0, self.speedup(first, second))
            except TwinError:
                self.failed = after.get("workers", 0)
                return None
            except Exception as error:  # of the program's own, or it came to its end
                seen.note_failure("another DataLoader under the step", error)
                return None

    def _restart_ms(self) -> float:
        """Return by how much longer it takes to begin an epoch with new workers."""
        took = []
        loader = self.seen.loader
        for persistent in (False, True):
            twin = TwinStep(
                lambda: None, loader, self.batches, workers=self._own, persistent=persistent
            )
            try:
                took.append(min(twin.begin_ms(perf_counter) for _ in range(2 + persistent)))
            except Exception:
                return 0.0
            finally:
                twin.close()
        return max(0.0, took[0] - took[1])


class _Stored:
    """A data set whose samples lie in memory."""

    def __init__(self, samples: dict[Any, Any]) -> None:
        self.samples = samples

    def __getitem__(self, index: Any) -> Any:
        return copy.copy(self.samples[index])

    def __len__(self) -> int:
        return len(self.samples)


def _repeated(step: Callable[[], Any], count: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(count):
            step()

    return steps
