"""The image pipeline as a DALI graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dlhelpers.arguments import whole_number
from dlhelpers.dali_io.edges import edge_gains
from dlhelpers.dali_io.sources import Source, open_source, require_dali
from dlhelpers.dali_io.transforms import (
    FLIP,
    MEAN,
    RATIO,
    SCALE,
    STD,
    numbers,
    shorter_side,
)
from dlhelpers.dali_io.windows import centre_windows, decoded_parts, random_windows

__all__ = ["ImagePipeline", "image_pipeline"]


@dataclass(frozen=True, kw_only=True)
class ImagePipeline:
    """What is done to each image, and where; :func:`image_pipeline` makes it and checks it.

    Attributes:
        source: where images and targets come from.
        size, batch_size, train, resize, scale, ratio, flip, mean, std, augment, threads, prefetch:
            as given to :func:`image_pipeline`.
        device: of the batches.
    """

    source: Source = field(repr=False)
    size: int
    batch_size: int
    train: bool
    device: torch.device
    resize: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Callable[[Any], Any] | None
    threads: int
    prefetch: int

    def places(self, sizes: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return what the graph is fed of each image: where to cut, whether to mirror.

        Args:
            sizes: int [N, 2], (height, width) of each image.
            rng: of the batch; every image draws the same count of numbers, whatever its size.

        Returns:
            Name of an input -> float32 [N, 2] in pixels, rows before columns; ``flip`` int32 [N];
            ``gain`` float32 [N, 4], what the outermost pixels lack, see edges.py.
        """
        if self.train:
            anchor, shape = random_windows(sizes, rng, self.scale, self.ratio)
            flip = rng.random(len(sizes)) < self.flip
            return _floats(anchor=anchor, shape=shape) | {"flip": flip.astype(np.int32)}
        start, end = centre_windows(sizes, self.size, self.resize)
        parts = decoded_parts(start, end, sizes, self.size, framed=self._has_edges)
        if self._has_edges:
            parts["gain"] = edge_gains(start, end, sizes, self.size).reshape(-1, 4)
        return _floats(**parts)

    @property
    def _has_edges(self) -> bool:
        """Whether the centre crop can reach an image's edge, which is then to be corrected."""
        # not behind operators of others, which may move the edges or see the black beyond them
        return not self.train and self.resize - self.size < 2 and self.augment is None

    def build(
        self, feed: Callable[[], tuple[Any, ...]], *, batch_size: int | None = None, seed: int = 0
    ) -> Any:
        """Return a built ``nvidia.dali.Pipeline``.

        Its outputs: images float32 [N, 3, size, size] on the device; their indices int64 [N], which
        go through DALI with them, so that no image can get another one's target; and ``gain``
        where :meth:`places` has it.

        Args:
            feed: called for each batch; returns the images, a list of arrays, their indices, and
                then the arrays of :meth:`places`; raises StopIteration when there are no more.
            batch_size: the largest that ``feed`` gives; None for the pipeline's own.
            seed: of random operators in ``augment``.
        """
        require_dali()
        from nvidia.dali import Pipeline

        pipeline = Pipeline(
            batch_size=batch_size or self.batch_size,
            num_threads=self.threads,
            device_id=None if self.device.type == "cpu" else self.device.index or 0,
            prefetch_queue_depth=self.prefetch,
            exec_dynamic=True,  # gives the memory of its outputs away, see executor.py
            seed=seed,
        )
        with pipeline:
            fed = self._inputs(feed)
            passed = [fed[name] for name in ("index", "gain") if name in fed]
            pipeline.set_outputs(self._graph(fed), *passed)
        pipeline.build()
        return pipeline

    def _graph(self, fed: dict[str, Any]) -> Any:
        """Return the node of the images, from the nodes of what is fed."""
        from nvidia.dali import fn, types

        images = self._decode(fed)
        window = {} if self.train else {"roi_start": fed["start"], "roi_end": fed["end"]}
        images = fn.resize(
            images, size=(self.size, self.size), subpixel_scale=False, antialias=True, **window
        )
        if self.augment is not None:
            images = self.augment(images)
        return fn.crop_mirror_normalize(
            images,
            mirror=fed["flip"] if self.train else 0,
            mean=[255 * value for value in self.mean],
            std=[255 * value for value in self.std],
            dtype=types.FLOAT,
            output_layout="CHW",
        )

    def _inputs(self, feed: Callable[[], tuple[Any, ...]]) -> dict[str, Any]:
        """Return the nodes of what is fed: images, indices and each of :meth:`places`."""
        from nvidia.dali import fn, types

        pixels = self.source.kind == "pixels"
        places = self.places(np.ones((1, 2), dtype=np.int64), np.random.default_rng(0))
        nodes = fn.external_source(
            source=feed,
            num_outputs=2 + len(places),
            dtype=[types.UINT8, types.INT64]
            + [types.INT32 if name == "flip" else types.FLOAT for name in places],
            ndim=[3 if pixels else 1, 0, *(array.ndim - 1 for array in places.values())],
            layout=["HWC" if pixels else ""],
        )
        return dict(zip(["images", "index", *places], nodes, strict=True))

    def _decode(self, fed: dict[str, Any]) -> Any:
        """Return the part of the images that is needed, uint8 HWC, on the device."""
        from nvidia.dali import fn, types

        images, part = fed["images"], (fed["anchor"], fed["shape"])
        pixels = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
        on_gpu = self.device.type == "cuda"
        if self.source.kind == "pixels":
            images = fn.slice(images, *part, **pixels)
            images = images.gpu() if on_gpu else images
        else:
            images = fn.decoders.image_slice(
                images,
                *part,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,  # ImageFolder and PIL leave EXIF's rotation alone too
                jpeg_fancy_upsampling=True,  # on the GPU as on the CPU
                **pixels,
            )
        if "frame_shape" not in fed:
            return images
        frame = (fed["frame_anchor"], fed["frame_shape"])
        return fn.slice(images, *frame, out_of_bounds_policy="pad", **pixels)


def image_pipeline(
    source: Any,
    *,
    size: int,
    batch_size: int,
    train: bool,
    device: str | torch.device = "auto",
    resize: int | None = None,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
    flip: float = FLIP,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    augment: Callable[[Any], Any] | None = None,
    threads: int | None = None,
    prefetch: int = 2,
    fields: tuple[str, str] | None = None,
) -> ImagePipeline:
    """Describe the standard image pipeline; :class:`DALILoader` runs it.

    ``train``: a random crop (RandomResizedCrop), resized to ``size``; a random horizontal flip.
    Otherwise: the shorter side resized to ``resize``, the centre cropped. Then normalised. Only the
    part of a JPEG that is needed is decoded, and the eval pipeline resizes that part alone.

    Where there is no GPU, ``DataLoader(LMDBDataset(path, torchvision_transform(size, train),
    threads=N), ...)`` may be faster, since DALI's resize on the CPU is its slow part:
    benchmarks/dali.py tells for your machine.

    Args:
        source: a folder with one folder for each class; a list of (path, target); whatever has
            such ``samples`` and does no more than read them (ImageFolder); or an LMDBDataset. A
            dataset with a transform, a loader or a ``__getitem__`` of its own is refused, since
            DALI would not run it.
        size: height and width of the result, in pixels.
        batch_size: images of a batch.
        train: random crop and flip, or centre crop.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` (CUDA where torch has it). On CUDA
            decoding and all that follows run there.
        resize: shorter side before the centre crop, in pixels; None for size * 256 / 224.
        scale, ratio: of the random crop, as RandomResizedCrop's.
        flip: probability of the horizontal flip.
        mean, std: for the pixels from 0 to 1, one for each channel.
        augment: from a DALI node (uint8, HWC, after the crop) to one; calls ``fn.*``. Its random
            operators follow seed and shard, but not the epoch.
        threads: of DALI, and of reading; None for as many as this process may use cores.
        prefetch: batches that are prepared ahead.
        fields: names of the image and of the label of a database that was written with
            ``fields=``; None where it has one of each.

    Raises:
        ImportError: DALI is not installed; says what to do.
        FileNotFoundError, TypeError, ValueError: source or an option is not what it must be.
    """
    require_dali()
    size, batch_size = whole_number("size", size, 1), whole_number("batch_size", batch_size, 1)
    shorter = whole_number("resize", shorter_side(size, resize), size)
    low, high = scale = numbers("scale", scale, 2)
    if not 0 < low <= high <= 1:
        raise ValueError(f"scale must be shares of the area, 0 < low <= high <= 1, got {scale}")
    narrow, wide = ratio = numbers("ratio", ratio, 2)
    if not 0 < narrow <= wide:
        raise ValueError(f"ratio must be width / height, 0 < low <= high, got {ratio}")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must be a probability from 0 to 1, got {flip!r}")
    mean, std = numbers("mean", mean, 3), numbers("std", std, 3)
    if min(std) <= 0:
        raise ValueError(f"std must be above 0, got {std}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ImagePipeline(
        source=open_source(source, fields),
        size=size,
        batch_size=batch_size,
        train=train,
        device=_device(device),
        resize=shorter,
        scale=(low, high),
        ratio=(narrow, wide),
        flip=flip,
        mean=mean,
        std=std,
        augment=augment,
        threads=whole_number("threads", (cores or 1) if threads is None else threads, 1),
        prefetch=whole_number("prefetch", prefetch, 1),
    )


def _device(device: str | torch.device) -> torch.device:
    here = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if here else "cpu"
    try:
        found = torch.device("cuda" if device == "gpu" else device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {device!r}')
    if found.type == "cuda" and not here:
        raise ValueError(f'device={device!r}, but torch finds no CUDA device: use device="cpu"')
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return found


def _floats(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float32) for name, array in arrays.items()}
