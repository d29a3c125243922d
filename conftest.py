"""Doctests of modules whose extra is not installed are skipped, by name; a fixture for tests."""

import functools
import gc
import importlib.util
from collections.abc import Iterator

import pytest

# module, or package with all below it -> (what is imported, the extra that brings it)
NEEDED = {
    "dlhelpers.lmdb_io": ("lmdb", "lmdb"),
    "dlhelpers.dali_io": ("torchvision", "dali"),
    "dlhelpers.drawing": ("matplotlib", "plots"),
    "dlhelpers.course": ("sklearn", "course"),
}


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them; pytest calls this when all tests are found."""
    for item in items:
        if not isinstance(item, pytest.DoctestItem):
            continue
        for package, (module, extra) in NEEDED.items():
            if f"{item.name}.".startswith(f"{package}.") and not _has(module):
                item.add_marker(pytest.mark.skip(reason=f"{item.name} needs the extra {extra}"))


@pytest.fixture(scope="module")
def little_to_collect() -> Iterator[None]:
    """Set aside what is imported: to look at it or to collect it takes a fifth of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def one_table_of_operators() -> Iterator[None]:
    """Keep the table of ONNX's operators, which torch makes anew for every export."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # a private place
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        kept = functools.cache(ONNXRegistry.from_torchlib)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(kept))
        yield
