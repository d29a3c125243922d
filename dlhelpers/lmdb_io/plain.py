"""Does a dataset give the images of its files as they are?

A reader that goes to the files itself, for their encoded bytes, leaves out whatever the dataset
does to them: transforms, a loader that turns photographs upright, a ``__getitem__`` that changes
targets. Here is decided, for every reader, whether there is anything to leave out.
"""

from __future__ import annotations

from typing import Any

__all__ = ["is_plain_folder", "own_reading"]

_FOLDER = ("torchvision.datasets.folder", "DatasetFolder")
_DATABASE = ("dlhelpers.lmdb_io.dataset", "LMDBDataset")
_LOADERS = {(_FOLDER[0], "default_loader"), (_FOLDER[0], "pil_loader")}


def own_reading(dataset: Any) -> str:
    """Return what a dataset does beyond decoding its files or records, empty where nothing.

    Recognized by name, so that neither torch nor torchvision is imported: what torchvision's
    ImageFolder and LMDBDataset themselves do is reading alone.

    >>> class Turned:
    ...     def __getitem__(self, index): ...
    >>> own_reading(Turned())
    'its own __getitem__ (Turned.__getitem__)'
    """
    for name in ("transform", "target_transform"):
        if (value := getattr(dataset, name, None)) is not None:
            return f"{name}={value!r}"
    loader = getattr(dataset, "loader", None)
    if loader is not None:
        found = (getattr(loader, "__module__", ""), getattr(loader, "__qualname__", ""))
        if found not in _LOADERS:
            return f"loader={loader!r}"
    for name in ("__getitem__", "__getitems__", "__len__"):
        owner = next((kind for kind in type(dataset).__mro__ if name in vars(kind)), None)
        if owner is not None and _named(owner) not in (_FOLDER, _DATABASE):
            return f"its own {name} ({owner.__name__}.{name})"
    return ""


def is_plain_folder(dataset: Any) -> bool:
    """Whether it is torchvision's ImageFolder, or a kin of it, that gives its files as they are."""
    kinds = type(dataset).__mro__
    return any(_named(kind) == _FOLDER for kind in kinds) and not own_reading(dataset)


def _named(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__
