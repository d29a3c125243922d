"""What do all records of a dataset hold, without an object for each?

``dataset.targets`` and ``dataset.samples`` behave as ImageFolder's lists do, and read their items
where they are stored. NumPy gets integer targets as the array in the file, whose pages all
processes share.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.columns import Block, read_pair, read_targets, unpack_block
from dlhelpers.lmdb_io.earlier import keys_of_index, targets_of_index
from dlhelpers.lmdb_io.mapping import mapped

__all__ = ["Columns", "Samples", "Targets"]

_AT_ONCE = 1 << 13  # items that are Python objects at one time
_SHOWN = 10
_Reader = Callable[[Block, int, int], list[Any]]


class _Listed(Sequence[Any]):
    """A sequence that is compared and added as a list, and to which nothing can be assigned."""

    def __init__(self, columns: Columns, positions: range | None = None) -> None:
        self._columns = columns
        self._positions = range(len(columns)) if positions is None else positions

    def _some(self, positions: range) -> list[Any]:
        raise NotImplementedError

    def _one(self, position: int) -> Any:
        return self._some(range(position, position + 1))[0]

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(self._columns, self._positions[index])
        try:
            position = self._positions[operator.index(index)]
        except IndexError:
            raise _out_of_range(index, self) from None
        return self._one(position)

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), _AT_ONCE):
            yield from self._some(self._positions[first : first + _AT_ONCE])

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, list | _Listed):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Any) -> list[Any]:
        return [*self, *other] if isinstance(other, list | _Listed) else NotImplemented

    def __radd__(self, other: Any) -> list[Any]:
        return [*other, *self] if isinstance(other, list) else NotImplemented

    def __repr__(self) -> str:
        if len(self) <= _SHOWN:
            return repr(list(self))
        return f"[{', '.join(map(repr, self[: _SHOWN - 1]))}, ..., {self[-1]!r}]"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._columns, self._positions)


class Targets(_Listed):
    """The targets of all records, as a list has them.

    An item is what is stored, an int for a class. A slice is another such sequence.
    ``np.asarray(targets)`` is int32 [N], or int64 where a target needs it: read-only, and no copy
    of what one file holds. ``np.array(targets)`` is a copy that can be written.
    """

    @cached_property
    def _array(self) -> np.ndarray | None:
        array = self._columns.array
        return None if array is None else _taken(array, self._positions)

    def _some(self, positions: range) -> list[Any]:
        array = self._columns.array
        if array is None:
            return self._columns.read(positions, Block.targets_between)
        return _taken(array, positions).tolist()

    def __getitem__(self, index: Any) -> Any:
        if self._array is None or isinstance(index, slice):
            return super().__getitem__(index)
        try:
            return self._array.item(operator.index(index))
        except IndexError:
            raise _out_of_range(index, self) from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._array is not None:
            return np.array(self._array, dtype, copy=copy)
        if copy is False:
            raise ValueError("the targets are no integers: an array of them is a copy")
        return np.array(list(self), dtype)

    def count(self, value: Any) -> int:
        """Return how many targets are equal to a value."""
        if self._array is None or not isinstance(value, int):
            return super().count(value)
        return int(np.count_nonzero(self._array == value))


class Samples(_Listed):
    """(source key, target) of all records, as a list has them; a slice is another such sequence."""

    def _some(self, positions: range) -> list[tuple[str, Any]]:
        return self._columns.read(positions, _pairs)

    def _one(self, position: int) -> tuple[str, Any]:
        return self._columns.pair(position)


class Columns:
    """Keys and targets of a dataset, in order of its files.

    Args:
        files: as LMDBDataset opens them.
    """

    def __init__(self, files: Sequence[Any]) -> None:
        self._files = files
        self._parts = [
            (_Stored if "columns" in file.meta else _Indexed)(file) for file in self._files
        ]
        self._ends = [*itertools.accumulate(file.meta["count"] for file in self._files)]

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def array(self) -> np.ndarray | None:
        """All targets, int32 or int64 [N]; None where one is no integer of 64 bits."""
        arrays = [part.array for part in self._parts]
        if any(array is None for array in arrays):
            return None
        return arrays[0] if len(arrays) == 1 else _read_only(np.concatenate(arrays))

    def read(self, positions: range, reader: _Reader) -> list[Any]:
        """Return what a reader takes of the records at some positions."""
        if positions.step != 1:
            return [self.read(range(n, n + 1), reader)[0] for n in positions]
        found: list[Any] = []
        first, last = positions.start, positions.stop
        while first < last:
            number = bisect.bisect_right(self._ends, first)
            part, begin = self._parts[number], self._ends[number] - self._parts[number].count
            found += part.read(first - begin, min(last - begin, part.count), reader)
            first = min(last, self._ends[number])
        return found

    def pair(self, position: int) -> tuple[str, Any]:
        """Return key and target of one record."""
        number = bisect.bisect_right(self._ends, position) if len(self._ends) > 1 else 0
        part = self._parts[number]
        return part.pair(position - self._ends[number] + part.count)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._files,)  # what was read is read again where it is needed


class _Stored:
    """The columns of one file."""

    def __init__(self, file: Any) -> None:
        self.count, self._file = file.meta["count"], file
        self._sound: set[int] = set()  # blocks whose checksums were compared

    @cached_property
    def _firsts(self) -> list[int]:
        """Return where the blocks begin."""
        environment = self._open()
        keys = environment.keys(environment.columns)
        firsts = [int(key) for key in keys if key.isdigit()]
        if len(firsts) != self._file.meta["columns"]["blocks"] or firsts[:1] not in ([0], []):
            raise self._damaged("blocks of keys are missing")
        return firsts

    @cached_property
    def array(self) -> np.ndarray | None:
        if (arrays := self._file.meta["columns"]["arrays"]) is None:
            return None
        environment = self._open()

        def map_file(view: memoryview) -> Any:
            return mapped(view, self._file.path, environment.page_size)

        with environment.begin(db=environment.columns) as txn:
            try:
                array = read_targets(txn, arrays, map_file)
            except schema.DatabaseError as error:
                raise self._damaged(error) from None
        if len(array) != self.count:
            raise self._damaged(f"there are {len(array)} targets of {self.count} records")
        return _read_only(array)

    def read(self, first: int, last: int, reader: _Reader) -> list[Any]:
        firsts, environment, found = self._firsts, self._open(), []
        with environment.begin(db=environment.columns) as txn:
            while first < last:
                number = bisect.bisect_right(firsts, first) - 1
                begin = firsts[number]
                end = firsts[number + 1] if number + 1 < len(firsts) else self.count
                view = txn.get(schema.position_key(begin))
                try:
                    block = unpack_block(view, begin, check=number not in self._sound)
                except schema.DatabaseError as error:
                    raise self._damaged(error) from None
                if len(block) != end - begin:
                    raise self._damaged(f"the block of keys from record {begin} on has an odd end")
                self._sound.add(number)
                found += reader(block, first - begin, min(last, end) - begin)
                first = end
        return found

    def pair(self, position: int) -> tuple[str, Any]:
        number = bisect.bisect_right(self._firsts, position) - 1
        if number not in self._sound:
            return self.read(position, position + 1, _pairs)[0]
        begin, environment = self._firsts[number], self._open()
        with environment.begin(db=environment.columns) as txn:
            return read_pair(txn.get(schema.position_key(begin)), position - begin)

    def _open(self) -> Any:
        environment = self._file.open()
        if environment.columns is None:
            raise self._damaged("the columns of keys and targets are missing")
        return environment

    def _damaged(self, what: object) -> schema.DatabaseError:
        return schema.DatabaseError(
            f"{self._file.path}: {what}; verify_lmdb finds all that is damaged, a new conversion "
            "writes it again"
        )


class _Indexed:
    """The index of one file of an earlier version, read when it is needed."""

    def __init__(self, file: Any) -> None:
        self.count, self._file = file.meta["count"], file

    @cached_property
    def _targets(self) -> Any:
        return targets_of_index(self._file)

    @cached_property
    def _block(self) -> Block:
        return Block(keys_of_index(self._file), self._targets)

    @property
    def array(self) -> np.ndarray | None:
        return _read_only(self._targets) if isinstance(self._targets, np.ndarray) else None

    def read(self, first: int, last: int, reader: _Reader) -> list[Any]:
        return reader(self._block, first, last)

    def pair(self, position: int) -> tuple[str, Any]:
        return self.read(position, position + 1, _pairs)[0]


def _out_of_range(index: int, listed: _Listed) -> IndexError:
    return IndexError(f"index {index} is out of range, there are {len(listed)} items")


def _pairs(block: Block, first: int, last: int) -> list[Any]:
    keys, targets = block.keys_between(first, last), block.targets_between(first, last)
    return list(zip(keys, targets, strict=True))


def _taken(array: np.ndarray, positions: range) -> np.ndarray:
    """Return a view of the elements at some positions."""
    stop = positions.stop if positions.stop >= 0 else None  # a range that goes down to 0
    return array[positions.start : stop : positions.step] if len(positions) else array[:0]


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
