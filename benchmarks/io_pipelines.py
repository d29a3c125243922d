"""Peers that give whole batches by threads of their own, and a reader that tells its memory.

benchmarks/io.py runs them. Packages are imported where they are needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from io_peers import BATCH, Photos
from torchvision.datasets import ImageFolder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Dali:
    """DALI's file reader and decoder on the CPU, shuffled through its buffer of 1,024 images.

    ``pixels`` gives uint8 [B, 3, H, W], ``training`` the random crop 224, flip and normalisation,
    float32. With one thread the executor works while it is called, with more it works ahead, but
    only within a call of several batches. Batches are copied out of DALI's buffers, as its own
    PyTorch iterator does it.
    """

    def __init__(self, photos: Photos, threads: int, training: bool = False) -> None:
        from nvidia.dali import fn, pipeline_def, types

        self.ahead = 1 if threads == 1 else 2
        kept = {"exec_dynamic": False} | (
            {"exec_async": False, "exec_pipelined": False} if threads == 1 else {}
        )

        @pipeline_def(
            batch_size=BATCH,
            num_threads=threads,
            device_id=None,
            prefetch_queue_depth=self.ahead,
            seed=1,
            **kept,
        )
        def pipeline() -> Any:
            encoded, targets = fn.readers.file(
                files=photos.paths,
                labels=photos.targets,
                random_shuffle=True,
                initial_fill=1024,
            )
            if not training:
                return fn.decoders.image(encoded, device="cpu", output_type=types.RGB), targets
            images = fn.decoders.image_random_crop(encoded, device="cpu", output_type=types.RGB)
            images = fn.resize(images, size=(224, 224), antialias=True)
            images = fn.crop_mirror_normalize(
                images,
                mirror=fn.random.coin_flip(),
                mean=[255 * m for m in MEAN],
                std=[255 * s for s in STD],
                dtype=types.FLOAT,
                output_layout="CHW",
            )
            return images, targets

        self.pipeline = pipeline()
        self.pipeline.build()
        self.training = training

    def batches(self, count: int, copy: bool = True) -> Any:
        """Run exactly ``count`` batches and return the last."""
        pipeline, scheduled = self.pipeline, min(self.ahead, count)
        for _ in range(scheduled):
            pipeline.schedule_run()
        for _ in range(count):
            images, targets = pipeline.share_outputs()
            batch = torch.from_dlpack(images.as_tensor())
            batch = batch.clone() if copy else batch
            batch = batch if self.training else batch.permute(0, 3, 1, 2)
            numbers = torch.from_dlpack(targets.as_tensor()).clone().flatten()
            pipeline.release_outputs()
            if scheduled < count:
                pipeline.schedule_run()
                scheduled += 1
        return batch, numbers


def spdl_epoch(photos: Photos, threads: int) -> Callable[[], tuple[int, Any]]:
    """SPDL's pipeline: whole batches decoded by its threads, random order."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    spdl.io.load_image(photos.paths[0])  # says at once that FFmpeg's libraries are missing

    def load(numbers: Sequence[int]) -> Any:
        paths = [photos.paths[i] for i in numbers]
        pixels = spdl.io.to_torch(spdl.io.load_image_batch(paths, width=None, height=None))
        return pixels.permute(0, 3, 1, 2), torch.tensor([photos.targets[i] for i in numbers])

    def epoch() -> tuple[int, Any]:
        order = torch.randperm(len(photos)).split(BATCH)
        builder = PipelineBuilder().add_source([part.tolist() for part in order])
        builder = builder.pipe(load, concurrency=threads).add_sink(2)
        count, batch = 0, None
        with (pipeline := builder.build(num_threads=threads)).auto_stop():
            for batch in pipeline.get_iterator():
                count += len(batch[0])
        return count, batch

    return epoch


def ffcv_epoch(photos: Photos, threads: int) -> Callable[[], tuple[int, Any]]:
    """FFCV's loader and threads; its writer stores a JPEG of its own of each image."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Squeeze, ToTensor
    from ffcv.writer import DatasetWriter

    path = str(photos.work / "photos.beton")
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "target": IntField()}
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(ImageFolder(photos.folder))
    pipelines = {
        "image": [SimpleRGBImageDecoder(), ToTensor()],
        "target": [IntDecoder(), ToTensor(), Squeeze()],
    }
    loader = Loader(
        path, BATCH, threads, order=OrderOption.RANDOM, pipelines=pipelines, os_cache=True
    )

    def epoch() -> tuple[int, Any]:
        count = 0
        for images, targets in loader:
            batch = images.permute(0, 3, 1, 2).clone(), targets.clone()  # its buffers are reused
            count += len(images)
        return count, batch

    return epoch


# ---- memory ----


def own_memory() -> dict[str, float]:
    """MB of this process in /proc/self/smaps_rollup."""
    rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    found = {row[0][:-1]: int(row[1]) / 1e3 for row in rows if row[-1] == "kB"}
    names = ("Private_Clean", "Private_Dirty", "Shared_Clean", "Anonymous")
    return {name: found[name] for name in names}


def read_epoch(path: str, wait: Any, results: Any) -> None:
    """Read all images of a database in random order, wait for the others, tell the memory."""
    from dlhelpers.lmdb_io import LMDBDataset

    torch.set_num_threads(1)
    dataset = LMDBDataset(path)
    for part in torch.randperm(len(dataset)).split(BATCH):
        dataset.__getitems__(part.tolist())
    wait.wait()
    results.put(json.dumps(own_memory()))
    wait.wait()
