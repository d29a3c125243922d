"""What does a reader get of a record that holds several fields?"""

from __future__ import annotations

from typing import Any

import torch

from dlhelpers.lmdb_io import decoding, schema
from dlhelpers.lmdb_io.encoding import image_format
from dlhelpers.lmdb_io.fields import Fields, decode_field
from dlhelpers.lmdb_io.pictures import PICTURES, open_picture, picture_pixels

__all__ = ["SampleReader"]


class SampleReader:
    """Makes samples of records, for :class:`LMDBDataset`.

    JPEG and raw pixels become RGB [3, H, W], other images tensors in their own mode: [H, W] of a
    mask, [C, H, W] of colours.

    Args:
        fields: of the database.
        decode: as LMDBDataset takes it.
        channels_last: the layout of RGB pixels.
    """

    def __init__(self, fields: Fields, decode: str | None, channels_last: bool) -> None:
        self.fields, self._decode, self._channels_last = fields, decode, channels_last
        self._label = fields.label

    def sample(self, record: schema.Record, path: Any, position: int) -> Any:
        """Return the sample, a dict, tuple or list as it was given.

        Raises:
            DatabaseError: a field cannot be decoded; names it.
        """
        container, stored = self._unpacked(record, path, position)
        values = []
        for (name, kind), data in zip(self.fields.kinds, stored, strict=True):
            if name == self._label:
                values.append(record.target)
                continue
            try:
                is_picture = kind in PICTURES
                values.append(self._picture(data) if is_picture else decode_field(data, kind))
            except Exception as error:  # decoders raise a dozen kinds
                raise schema.DatabaseError(
                    f"{path}, record {position}, key {record.key!r}: the field {name!r} cannot be "
                    f"decoded as {kind} ({error}); its bytes are as they were stored if "
                    "verify_lmdb finds nothing"
                ) from error
        if container is dict:
            return dict(zip(self.fields.names, values, strict=True))
        return container(values)

    def stored(self, record: schema.Record, path: Any, position: int) -> dict[str, bytes]:
        """Return the bytes of each field by name; of the label its JSON."""
        _, stored = self._unpacked(record, path, position)
        found = {n: bytes(data) for n, data in zip(self.fields.names, stored, strict=True)}
        return found | ({self._label: schema.encode_target(record.target)} if self._label else {})

    def _unpacked(
        self, record: schema.Record, path: Any, position: int
    ) -> tuple[type, list[memoryview]]:
        try:
            return self.fields.unpack(record.image)
        except ValueError as error:
            raise schema.DatabaseError(f"{path}: record {position} is damaged: {error}") from None

    def _picture(self, data: memoryview) -> Any:
        if self._decode is None:
            return bytes(data)
        is_rgb = image_format(data) in ("jpeg", "webp", "raw")
        if self._decode == "pil":
            return decoding.open_pil(data) if is_rgb else open_picture(data)
        if is_rgb:
            pixels = decoding.load_decoder(self._decode)(data)
            if not self._channels_last:
                return torch.from_numpy(decoding.planar(pixels))
        else:
            pixels = picture_pixels(data)
        tensor = torch.from_numpy(pixels)
        if tensor.ndim == 2:
            return tensor
        tensor = tensor.permute(2, 0, 1)
        return tensor if self._channels_last else tensor.contiguous()
