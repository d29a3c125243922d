"""The image pipeline as a DALI graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dlhelpers.dali_io.edges import edge_gains
from dlhelpers.dali_io.sources import Source, open_source, require_dali
from dlhelpers.dali_io.transforms import MEAN, STD, check_shape, shorter_side
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
        """Return what the graph is fed beside the images: where to cut, what to mirror.

        Args:
            sizes: int [N, 2], (height, width) of each image.
            rng: of the batch; every image draws the same count of numbers, whatever its size.

        Returns:
            Name of an input -> float32 [N, 2] in pixels, rows before columns; ``flip`` int32 [N].
        """
        if self.train:
            anchor, shape = random_windows(sizes, rng, self.scale, self.ratio)
            flip = rng.random(len(sizes)) < self.flip
            return _floats(anchor=anchor, shape=shape) | {"flip": flip.astype(np.int32)}
        start, end = centre_windows(sizes, self.size, self.resize)
        return _floats(**decoded_parts(start, end, sizes, self.size, framed=self._has_edges))

    def gains(self, sizes: np.ndarray) -> np.ndarray | None:
        """Return what the outermost pixels are to be multiplied by, see edges.py; None for 1."""
        if not self._has_edges:
            return None
        return edge_gains(*centre_windows(sizes, self.size, self.resize), sizes, self.size)

    @property
    def _has_edges(self) -> bool:
        """Whether the centre crop can reach an image's edge, which is then to be mended."""
        # not behind operators of others, which may move the edges or see the black beyond them
        return not self.train and self.resize - self.size < 2 and self.augment is None

    def build(
        self, feed: Callable[[], tuple[Any, ...]], *, batch_size: int | None = None, seed: int = 0
    ) -> Any:
        """Return a built ``nvidia.dali.Pipeline`` with one output, float32 [N, 3, size, size].

        Args:
            feed: called for each batch; returns the images, a list of arrays, and then the
                arrays of :meth:`places`; raises StopIteration when there are no more.
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
            pipeline.set_outputs(self._graph(feed))
        pipeline.build()
        return pipeline

    def _graph(self, feed: Callable[[], tuple[Any, ...]]) -> Any:
        from nvidia.dali import fn, types

        fed = self._inputs(feed)
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
        """Return the nodes of what is fed: the images and each of :meth:`places`."""
        from nvidia.dali import fn, types

        pixels = self.source.kind == "pixels"
        names = list(self.places(np.ones((1, 2), dtype=np.int64), np.random.default_rng(0)))
        nodes = fn.external_source(
            source=feed,
            num_outputs=1 + len(names),
            dtype=[types.UINT8] + [types.INT32 if n == "flip" else types.FLOAT for n in names],
            ndim=[3 if pixels else 1] + [0 if name == "flip" else 1 for name in names],
            layout=["HWC" if pixels else ""],
        )
        return dict(zip(["images", *names], nodes, strict=True))

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
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    augment: Callable[[Any], Any] | None = None,
    threads: int | None = None,
    prefetch: int = 2,
) -> ImagePipeline:
    """Describe the standard image pipeline; :class:`DALILoader` runs it.

    ``train``: a random crop (RandomResizedCrop), resized to ``size``; a random horizontal flip.
    Otherwise: the shorter side resized to ``resize``, the centre cropped. Then normalised. Only the
    part of a JPEG that is needed is decoded, and the eval pipeline resizes that part alone.

    Args:
        source: a folder with one folder for each class; a list of (path, target); whatever has
            such ``samples`` (ImageFolder); or an LMDBDataset, whose stored bytes are decoded by
            DALI.
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
        threads: of DALI; None for as many as this process may use cores.
        prefetch: batches that are prepared ahead.

    Raises:
        ImportError: DALI is not installed; says what to do.
        FileNotFoundError, TypeError, ValueError: source or an option is not what it must be.
    """
    require_dali()
    check_shape(size, batch_size, resize, scale, ratio, flip)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(
            f"mean and std need three numbers each, std above 0, got {mean!r} and {std!r}"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = cores or 1 if threads is None else threads
    for name, value in (("threads", threads), ("prefetch", prefetch)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")
    return ImagePipeline(
        source=open_source(source),
        size=size,
        batch_size=batch_size,
        train=train,
        device=_device(device),
        resize=shorter_side(size, resize),
        scale=tuple(scale),
        ratio=tuple(ratio),
        flip=flip,
        mean=tuple(mean),
        std=tuple(std),
        augment=augment,
        threads=threads,
        prefetch=prefetch,
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
