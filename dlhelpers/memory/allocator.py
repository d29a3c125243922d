"""How many bytes does the allocator hand out while an operator runs? Its own record.

On the CPU torch's profiler notes every allocation and every free, the scratch inside kernels
included; on CUDA the allocator keeps its present and its largest number of bytes.

Source: PyTorch documentation, torch.profiler (profile_memory) and torch.cuda.memory_stats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch

from dlhelpers.recording import recording

__all__ = ["CpuRecord", "CudaRecord", "record_of"]

_NAME = "dlhelpers.op:"


class CpuRecord:
    """The CPU allocator's record of what happens inside the ``with`` block.

    Raises:
        RuntimeError: another profiler is at work.
    """

    granularity = 1  # the record holds the bytes that were asked for

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._events: list[tuple[int, int, int]] = []

    def __enter__(self) -> CpuRecord:
        from torch.profiler import ProfilerActivity

        options = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
        self._profile = self._stack.enter_context(recording("measure_peak", **options))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        if error is None:
            tree = self._profile.profiler.kineto_results.experimental_event_tree()
            self._events = _in_order(tree)

    def mark(self, number: int) -> Any:
        """Return the context in which operator ``number`` runs."""
        return torch.autograd.profiler.record_function(f"{_NAME}{number}")

    @property
    def addresses(self) -> set[int]:
        """Addresses of all blocks that were handed out."""
        return {address for _, address, nbytes in self._events if nbytes > 0}

    def levels(self, ops: int) -> list[int]:
        """Return for each operator the most bytes alive while it ran, above those at the start.

        What was handed out between two operators counts for the second.
        """
        most: list[int | None] = [None] * ops  # only for operators that allocate
        end: list[int] = []  # level at the end of each
        level = 0
        for number, _, nbytes in [*self._events, (ops, 0, 0)]:
            end.extend([level] * (min(number, ops) - len(end)))
            level += nbytes
            if nbytes > 0 and number < ops:
                most[number] = max(most[number] or level, level)
        return [top if top is not None else at for top, at in zip(most, end, strict=True)]


def _in_order(tree: Any) -> list[tuple[int, int, int]]:
    """Return (number of the operator, address, bytes) of each allocation and free, by time."""
    from torch._C._profiler import _EventType

    found: list[tuple[int, int, int, int]] = []  # time, number or -1, address, bytes
    todo = list(tree)
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            block = event.extra_fields
            found.append((event.start_time_ns, -1, block.ptr, block.alloc_size))
        elif event.tag == _EventType.TorchOp and event.name.startswith(_NAME):
            found.append((event.end_time_ns, int(event.name[len(_NAME) :]), 0, 0))
    events, number = [], 0
    for _, ends, address, nbytes in sorted(found, key=lambda event: event[0]):
        if ends >= 0:
            number = ends + 1  # all that follows belongs to the next one
        else:
            events.append((number, address, nbytes))
    return events


class CudaRecord:
    """The CUDA allocator's statistics, operator by operator. Host side: nothing waits for it."""

    granularity = 512  # bytes to which the caching allocator rounds up
    addresses: frozenset[int] = frozenset()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most: list[int] = []

    def __enter__(self) -> CudaRecord:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._start = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @contextmanager
    def mark(self, number: int) -> Iterator[None]:
        """Run operator ``number`` in this context."""
        yield
        self._most.append(torch.cuda.max_memory_allocated(self._device) - self._start)
        torch.cuda.reset_peak_memory_stats(self._device)

    def levels(self, ops: int) -> list[int]:
        """Return as :meth:`CpuRecord.levels`."""
        return self._most[:ops]


def record_of(device: torch.device) -> CpuRecord | CudaRecord:
    """Return the record of a device's allocator.

    Raises:
        ValueError: no such device here, or one whose allocator keeps no record.
    """
    if device.type == "cpu":
        return CpuRecord()
    if device.type == "cuda" and torch.cuda.is_available():
        return CudaRecord(device)
    raise ValueError(
        f"device {str(device)!r} has no record of its memory here: use 'cpu', or 'cuda' where "
        "torch.cuda.is_available()"
    )
