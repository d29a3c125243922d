"""The peers of DALILoader, each with its own interface; benchmarks/dali.py runs them.

Each function makes everything that lasts and returns a call that goes through one epoch and gives
(images seen, last batch). Packages are imported where they are needed, so that one that is missing
costs its own row only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from dlhelpers.dali_io.transforms import MEAN, RATIO, SCALE, STD, shorter_side

BATCH, SIZE = 32, 224
RESIZE = shorter_side(SIZE, None)
MEAN_255, STD_255 = [255 * m for m in MEAN], [255 * s for s in STD]
Epoch = Callable[[], tuple[int, Any]]


@dataclass(frozen=True)
class Job:
    """What a table asks of its rows."""

    folder: Path
    database: Path
    count: int
    train: bool
    threads: int


def crop_some(folder: Path) -> None:
    """Cut the photographs down to many shapes, since squares would hide how sizes are rounded."""
    from PIL import Image

    for number, path in enumerate(sorted(folder.glob("*/*.jpg"))):
        with Image.open(path) as image:
            width, height = image.size
            shorter = width * 3 // 4 + number % (width // 4)
            size = (width, shorter) if number % 2 else (shorter, height)
            cropped = image.crop((0, 0, *size))
        cropped.save(path, quality=90)


def epoch_of(loader: Iterable[Any]) -> Epoch:
    """Return a call that loops over a loader of (images, targets)."""

    def epoch() -> tuple[int, Any]:
        count, batch = 0, None
        for batch in loader:
            count += len(batch[0])
        return count, batch

    return epoch


def random_window(height: int, width: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop, drawn as RandomResizedCrop draws."""
    for _ in range(10):
        area = height * width * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(*map(math.log, RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


# ---- torch's DataLoader ----


def loader_epoch(job: Job, dataset: Any, workers: int) -> Epoch:
    options: dict[str, Any] = {}
    if workers:
        options = {"persistent_workers": True, "multiprocessing_context": "forkserver"}
    loader = DataLoader(
        dataset,
        BATCH,
        shuffle=job.train,
        num_workers=workers,
        worker_init_fn=_one_thread,
        **options,
    )
    _one_thread(0)  # for the rows without a worker
    return epoch_of(loader)


def _one_thread(_: int) -> None:
    """Keep OpenCV from starting threads of its own beside the workers, as its users do."""
    try:
        import cv2
    except ImportError:  # its own rows say so
        return
    cv2.setNumThreads(0)


class OpenCV(Dataset):
    """OpenCV's decoder and resize, the rest in numpy.

    Scaling down by a little is INTER_AREA's work, which averages; crops of any size go through
    INTER_LINEAR, as in Albumentations, which does not: less work than antialiasing is.
    """

    def __init__(self, folder: Path, train: bool) -> None:
        import cv2  # noqa: F401 - says at once that it is missing

        self.samples, self.train = ImageFolder(folder).samples, train
        self.mean, self.scale = np.float32(MEAN_255), 1 / np.float32(STD_255)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        import cv2

        path, target = self.samples[index]
        image = cv2.imread(path, cv2.IMREAD_COLOR_RGB)
        height, width = image.shape[:2]
        if self.train:
            top, left, h, w = random_window(height, width)
            image = image[top : top + h, left : left + w]
            image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
            image = image[:, ::-1] if random.random() < 0.5 else image
        else:
            factor = RESIZE / min(height, width)
            size = round(width * factor), round(height * factor)
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            top, left = (size[1] - SIZE) // 2, (size[0] - SIZE) // 2
            image = image[top : top + SIZE, left : left + SIZE]
        pixels = image.astype(np.float32)
        pixels -= self.mean
        pixels *= self.scale
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), target


# ---- DALI ----


def dali_epoch(job: Job, **resize: Any) -> Epoch:
    """DALI's graph and iterator as its documentation shows them for PyTorch."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator

    resize["interp_type"] = types.INTERP_TRIANGULAR  # linear with antialiasing

    @pipeline_def(batch_size=BATCH, num_threads=job.threads, device_id=None, seed=1)
    def graph() -> Any:
        encoded, targets = fn.readers.file(
            file_root=str(job.folder), random_shuffle=job.train, pad_last_batch=True, name="Reader"
        )
        if job.train:
            images = fn.decoders.image_random_crop(
                encoded,
                device="cpu",
                output_type=types.RGB,
                random_area=SCALE,
                random_aspect_ratio=RATIO,
            )
            images = fn.resize(images, resize_x=SIZE, resize_y=SIZE, **resize)
        else:
            images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
            images = fn.resize(images, size=RESIZE, mode="not_smaller", **resize)
        images = fn.crop_mirror_normalize(
            images,
            crop=(SIZE, SIZE),
            mirror=fn.random.coin_flip() if job.train else 0,
            mean=MEAN_255,
            std=STD_255,
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        return images, targets

    pipeline = graph()
    pipeline.build()
    runs = _Runs(pipeline, -(-job.count // BATCH))
    iterator = DALIClassificationIterator(
        pipeline,
        reader_name="Reader",
        last_batch_policy=LastBatchPolicy.PARTIAL,
        prepare_first_batch=False,  # nothing before the first call
    )
    through = epoch_of(_Pairs(iterator))

    def epoch() -> tuple[int, Any]:
        if runs.allow():
            iterator.reset()  # as auto_reset=True would at the end of the call before
        return through()

    return epoch


class _Runs:
    """Lets a pipeline run one epoch's batches a call.

    The iterator asks for the next epoch's first batches while it gives the last ones of this epoch:
    they would be made in another row's time. Here they are asked for when the next call begins.
    """

    def __init__(self, pipeline: Any, batches: int) -> None:
        self._run, self._batches, self._left = pipeline.schedule_run, batches, 0
        self._depth = min(batches, pipeline.prefetch_queue_depth)
        self._first, self._begins = True, False
        pipeline.schedule_run = self._schedule

    def allow(self) -> bool:
        """Allow an epoch; say whether there was one before."""
        self._left, self._begins = self._batches, True
        return not self._first

    def _schedule(self) -> None:
        runs = self._depth if self._begins else min(1, self._left)  # fills the queue first
        self._left, self._begins = self._left - runs, False
        if self._first:  # DALI's very first run fills its queue by itself
            runs, self._first = 1, False
        for _ in range(runs):
            self._run()


class _Pairs:
    """(images, targets) of DALI's iterator."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator

    def __iter__(self) -> Any:
        return ((batch[0]["data"], batch[0]["label"]) for batch in self._iterator)


def dynamic_epoch(job: Job) -> Epoch:
    """DALI's operators called one by one from Python."""
    import nvidia.dali.experimental.dynamic as ndd
    from nvidia.dali import types

    reader = ndd.readers.File(
        file_root=str(job.folder), random_shuffle=job.train, pad_last_batch=True
    )
    context = ndd.EvalContext(num_threads=job.threads, device_id=None)
    down = {"interp_type": types.INTERP_TRIANGULAR}

    def batches() -> Any:
        left = job.count  # the rest of the last batch is padding
        for encoded, targets in reader.next_epoch(batch_size=BATCH):
            mirror: Any = 0
            if job.train:
                images = ndd.decoders.image_random_crop(
                    encoded, device="cpu", random_area=SCALE, random_aspect_ratio=RATIO
                )
                images = ndd.resize(images, size=(SIZE, SIZE), **down)
                mirror = ndd.random.coin_flip(batch_size=len(targets.tensors))
            else:
                images = ndd.decoders.image(encoded, device="cpu")
                images = ndd.resize(images, size=RESIZE, mode="not_smaller", **down)
            images = ndd.crop_mirror_normalize(
                images,
                crop=(SIZE, SIZE),
                mirror=mirror,
                mean=MEAN_255,
                std=STD_255,
                dtype=types.FLOAT,
                output_layout="CHW",
            )
            yield images.torch()[:left], targets.torch()[:left]
            left -= BATCH

    def epoch() -> tuple[int, Any]:
        with context:
            return epoch_of(batches())()

    return epoch


# ---- SPDL ----


def spdl_epoch(job: Job) -> Epoch:
    """SPDL's pipeline: FFmpeg decodes, crops and resizes in threads, torch normalises."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    samples = ImageFolder(job.folder).samples
    try:
        spdl.io.load_image(samples[0][0])
    except RuntimeError as error:
        raise ImportError("spdl needs FFmpeg's shared libraries") from error
    resized = (
        f"scale={RESIZE}:{RESIZE}:force_original_aspect_ratio=increase:flags=bilinear,"
        f"crop={SIZE}:{SIZE},format=pix_fmts=rgb24"
    )

    def decode(path: str) -> Any:
        packets, steps = spdl.io.demux_image(path), resized
        if job.train:
            # sizes are the filter's own, so the window is drawn as shares of them
            top, left, h, w = (part / 10_000 for part in random_window(10_000, 10_000))
            steps = f"crop=iw*{w}:ih*{h}:iw*{left}:ih*{top},scale={SIZE}:{SIZE}:flags=bilinear,"
            steps += ("hflip," if random.random() < 0.5 else "") + "format=pix_fmts=rgb24"
        return spdl.io.decode_packets(packets, filter_desc=steps)

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN_255, STD_255))

    def load(numbers: Sequence[int]) -> Any:
        frames = [decode(samples[i][0]) for i in numbers]
        pixels = spdl.io.to_torch(spdl.io.convert_frames(frames)).permute(0, 3, 1, 2)
        images = torch.empty(pixels.shape, dtype=torch.float32)
        torch.sub(pixels, mean, out=images).div_(std)
        return images, torch.tensor([samples[i][1] for i in numbers])

    def epoch() -> tuple[int, Any]:
        order = torch.randperm(job.count) if job.train else torch.arange(job.count)
        builder = PipelineBuilder().add_source([part.tolist() for part in order.split(BATCH)])
        # the order of the results is the source's unless "completion" is asked for
        builder = builder.pipe(load, concurrency=job.threads, output_order="input").add_sink(2)
        with (pipeline := builder.build(num_threads=job.threads)).auto_stop():
            return epoch_of(pipeline.get_iterator())()

    return epoch
