"""Which field of a database is the image for DALI, and which one its target?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlhelpers.dali_io.sources import Records
from dlhelpers.lmdb_io import LMDBDataset
from dlhelpers.lmdb_io.fields import Fields
from dlhelpers.lmdb_io.pictures import PICTURES, is_packed

__all__ = ["FieldRecords"]


class FieldRecords(Records):
    """The images of one field, and the labels of another.

    Args:
        dataset: of a database that was written with ``fields=``.
        fields: names of the image and of the label; None where there is one of each.

    Raises:
        ValueError: DALI can be given no such fields; names them.
    """

    def __init__(self, dataset: LMDBDataset, fields: Sequence[str] | None) -> None:
        self._image = _image_field(dataset, fields)
        self._position = list(dataset.fields).index(self._image)
        super().__init__(dataset)
        self.kind = "pixels" if dataset.fields[self._image] == "raw" else "bytes"

    def stored(self, indices: Sequence[int]) -> list[bytes]:
        """Return the stored bytes of the image field."""
        found = [
            sample[self._image if isinstance(sample, dict) else self._position]
            for sample in self._dataset.__getitems__(indices)
        ]
        for index, data in zip(indices, found, strict=True):
            if is_packed(data):
                raise ValueError(
                    f"the field {self._image!r} of record {index} has pixels of 32 bits, which "
                    "DALI would take for colours: read it with LMDBDataset"
                )
        return found


def _image_field(dataset: LMDBDataset, fields: Sequence[str] | None) -> str:
    """Return the name of the image, once DALI can be given both."""
    kinds = dataset.fields
    images = [name for name, kind in kinds.items() if kind in PICTURES]
    label = dataset.label
    has = str(Fields.given(kinds))
    if fields is None:
        if len(images) != 1 or label is None:
            raise ValueError(
                f"{dataset.path} has the fields {has}: DALI takes one image and one label, so name "
                'them, as in fields=("image", "label"); the others are read with LMDBDataset'
            )
        return images[0]
    named = fields if isinstance(fields, (tuple, list)) else ()
    if len(named) != 2 or not all(isinstance(name, str) for name in named):
        raise ValueError(
            'fields must be the names of one image and one label, such as ("image", "label"), got '
            f"{fields!r}: DALI takes no more, the others are read with LMDBDataset"
        )
    image, name = named
    if image not in images:
        what = f"is of the kind {kinds[image]}" if image in kinds else "does not exist"
        raise ValueError(
            f"the field {image!r} {what}, DALI needs an image ({', '.join(images) or 'none here'}) "
            f"of {dataset.path}"
        )
    if name != label:
        what = f"is of the kind {kinds[name]}" if name in kinds else "does not exist"
        hint = f"{label!r} is the one here" if label else "there is none here"
        raise ValueError(
            f"the field {name!r} {what}, DALI needs the one whose values lie in the index, of the "
            f"kind json and called label or target: {hint}; LMDBDataset reads every field"
        )
    return image


def refuse_fields(source: Any, fields: Any) -> None:
    """Raise where fields are named of a source that has none.

    Raises:
        ValueError: they are.
    """
    if fields is not None:
        raise ValueError(
            f"fields={fields!r} names fields of a database that was written with fields=, and "
            f"the {type(source).__name__} given has none: leave it out"
        )
