"""How does the script run, whole or a part of it, with any settings?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from dlhelpers import progress
from dlhelpers.course.story.parts import forever, network, score, train_batch, validate
from dlhelpers.course.story.photographs import (
    SIDE,
    Photos,
    Small,
    collate_by_list,
    to_tensor,
    write_parts,
)
from dlhelpers.course.story.runs import ScriptRun, Training
from dlhelpers.course.story.settings import BATCH, Part, Settings
from dlhelpers.dali_io.sources import has_dali
from dlhelpers.findings import Findings

__all__ = ["Script", "fair_steps"]

LEARNING_RATE = 0.002
_AHEAD = 4  # batches that a loader may have prepared
TARGET = 0.75  # accuracy on the validation photographs, at which training ends


class Script:
    """The script over a folder of photographs, which it makes; with any settings.

    Args:
        root: where the photographs and databases go.
        count: training photographs, and photographs to score; half of that number validate.
        side: of the files, in pixels.
        max_epochs: where training ends at the latest.
    """

    def __init__(
        self, root: str | Path, *, count: int = 72, side: int = 256, max_epochs: int = 60
    ) -> None:
        self.root, self.max_epochs = Path(root), max_epochs
        self._backends: dict[bytes, Any] = {}
        self._trained: dict[Settings, Training] = {}
        self._trained_in_memory: dict[Settings, Training] = {}
        self._images: dict[str, list[Any]] = {}
        self.folders = {
            name: write_parts(self.root / name, n, side, seed)
            for name, n, seed in (("train", count, 1), ("valid", count // 2, 2), ("new", count, 3))
        }

    def dataset(self, name: str, settings: Settings) -> Any:
        """Return ``train`` or ``valid``, from files or from the database."""
        photos = Photos(self.folders[name])
        if not settings.database:
            return photos
        from dlhelpers.lmdb_io import LMDBDataset, write_lmdb

        file = self.root / f"{name}.lmdb"
        if not file.exists():
            write_lmdb(Small(self.folders[name]), file, encode="png", progress=False)
        return LMDBDataset(file, to_tensor)

    def loader(self, name: str, settings: Settings) -> Any:
        """Return a loader of batches (images [N, 3, 48, 48], classes [N])."""
        dataset, train = self.dataset(name, settings), name == "train"
        if settings.dali and has_dali():
            from dlhelpers.dali_io import DALILoader, image_pipeline
            from dlhelpers.lmdb_io import LMDBDataset

            source = LMDBDataset(dataset.path) if settings.database else self.folders[name]
            pipeline = image_pipeline(
                source, size=SIDE, resize=SIDE, batch_size=BATCH, train=False, device="cpu",
                mean=(0.5,) * 3, std=(0.5,) * 3, threads=1,
            )  # fmt: skip
            return DALILoader(pipeline, shuffle=train, seed=0, drop_last=train)
        collate = default_collate if settings.stack else collate_by_list
        workers = int(settings.dali)
        return _batches(
            dataset, train, collate_fn=collate, num_workers=workers,
            persistent_workers=settings.dali,
        )  # fmt: skip

    def model(self, settings: Settings) -> nn.Sequential:
        """Return the network before training."""
        classes = len(Photos(self.folders["train"]).classes)
        return network(classes, settings.softmax, settings.depthwise)

    def step(self, part: Part, settings: Settings) -> Callable[[], Any]:
        """Return what is repeated of a part: a training step, a validation, eight scored."""
        if part == "train":
            return self.train_step(settings)
        if part == "valid":
            return self.validate_step(settings)
        return self.score_step(settings, self.train_in_memory(settings).model, 8)

    def train_step(self, settings: Settings) -> Callable[[], None]:
        """Return one training step that fetches its own batch, without end, for a profiler."""
        model = self.model(settings).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        batches = forever(self.loader("train", settings))
        next(batches)  # starts DALI or a worker, once: no timed step pays for it
        return lambda: train_batch(model, optimizer, next(batches))

    def validate_step(self, settings: Settings) -> Callable[[], None]:
        """Return a validation over all photographs."""
        model, batches = self.model(settings), self._batches("valid")
        return lambda: validate(model, batches, settings.no_grad)

    def score_step(
        self, settings: Settings, model: nn.Module, count: int | None = None
    ) -> Callable[[], list[int]]:
        """Return the scoring of the folder, or of its first photographs, by a trained model."""
        backend = self.backend(settings, model)
        photos = Photos(self.folders["new"], settings.draft)
        photos.files = photos.files[:count]
        return lambda: score(backend, photos, settings.score_batch)

    def backend(self, settings: Settings, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the trained model as it scores: as it is, folded, or on its fastest backend."""
        model = model.eval()
        if not (settings.int8 or settings.fold):
            return model
        photos = Photos(self.folders["train"])
        spread = range(0, len(photos), max(1, len(photos) // 48))  # some of each class
        some = torch.stack([photos[index][0] for index in spread])
        if settings.int8:
            from dlhelpers.quantization import quantize_static

            weights = b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values())
            if weights not in self._backends:  # the search takes seconds
                self._backends[weights] = quantize_static(
                    model, some.split(BATCH), engine=("onnxruntime", "openvino"), min_sqnr_db=25.0,
                    calibrator="min-max", budget_s=0.2,
                )  # fmt: skip
            return self._backends[weights]
        from dlhelpers.fusion import fuse_conv_bn

        return fuse_conv_bn(model, some[:2])[0]

    def train(self, settings: Settings) -> Training:
        """Return a training to the target; one that was done already where only scoring differs."""
        key = _for_training(settings)
        if key not in self._trained:
            self._trained[key] = self._train(
                key, *(self.loader(name, key) for name in ("train", "valid"))
            )
        return self._trained[key]

    def train_in_memory(self, settings: Settings) -> Training:
        """Return a training on the same images in the same order, which are read once."""
        key = Settings(softmax=settings.softmax, depthwise=settings.depthwise, no_grad=True)
        if key not in self._trained_in_memory:
            loaders = (self._loader(name) for name in ("train", "valid"))
            self._trained_in_memory[key] = self._train(key, *loaders)
        return self._trained_in_memory[key]

    def run(self, settings: Settings, *, anew: bool = False) -> ScriptRun:
        """Run the whole script; what is prepared once (database, int8) is not timed.

        Training and validation are those of an earlier run where nothing of them has changed,
        unless they are asked for ``anew``.
        """
        if anew:
            self._trained.pop(_for_training(settings), None)
        model, epochs, accuracy, train_s, validate_s = self.train(settings)
        scoring = self.score_step(settings, model)
        begin = perf_counter()
        labels = scoring()
        score_s = perf_counter() - begin
        peak = self.peak_bytes(settings)
        return ScriptRun(train_s, validate_s, score_s, epochs, accuracy, tuple(labels), peak)

    def peak_bytes(self, settings: Settings) -> int:
        """Return the peak of a training step or of validation, whichever is larger, in bytes."""
        from dlhelpers.memory import measure_peak

        model, batches = self.model(settings), self._batches("valid")
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

        def step() -> None:
            train_batch(model, optimizer, batches[0])

        step()  # the optimizer's state is there from now on
        return max(measure_peak(step).peak_bytes, self.validation_bytes(settings))

    def validation_bytes(self, settings: Settings) -> int:
        """Return the peak of a validation over all photographs, in bytes."""
        from dlhelpers.memory import measure_peak

        return measure_peak(self.validate_step(settings)).peak_bytes

    def mistakes(self, settings: Settings) -> Findings:
        """Return what ``pairing.check`` finds in outputs, loss and targets of a batch."""
        from dlhelpers import pairing

        images, labels = self._batches("valid")[0]
        return pairing.check(self.model(settings), nn.CrossEntropyLoss(), labels, images)

    def _train(self, settings: Settings, train: Any, valid: Any) -> Training:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model(settings)
            optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
            for loader in (train, valid) if settings.dali and has_dali() else ():
                loader.peek()  # DALI starts once, whatever the number of epochs
            took, looked, accuracy, epoch = 0.0, 0.0, 0.0, 0
            with progress.bar(progress=None, desc="training", unit="epoch") as shown:
                while accuracy < TARGET and epoch < self.max_epochs:
                    begin = perf_counter()
                    model.train()
                    for batch in train:
                        train_batch(model, optimizer, batch)
                    trained = perf_counter()
                    accuracy = validate(model, valid, settings.no_grad)
                    epoch += 1
                    took, looked = took + trained - begin, looked + perf_counter() - trained
                    shown.update(1)
        return Training(model, epoch, accuracy, took, looked)

    def _loader(self, name: str) -> DataLoader:
        """Return the batches of images that are in memory, in the order of :meth:`loader`."""
        if name not in self._images:
            self._images[name] = list(Photos(self.folders[name]))
        return _batches(self._images[name], train=name == "train")

    def _batches(self, name: str) -> list[Any]:
        return list(self._loader(name))


def _batches(dataset: Any, train: bool, **options: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        dataset, BATCH, shuffle=train, generator=generator, drop_last=train, **options
    )


def _for_training(settings: Settings) -> Settings:
    """Return the settings with those of scoring as found."""
    found, scoring = Settings(), ("score_batch", "fold", "int8", "draft")
    return dataclasses.replace(settings, **{name: getattr(found, name) for name in scoring})


def fair_steps(
    script: Script, part: Part, before: Settings, after: Settings
) -> tuple[tuple[Callable[[], Any], Callable[[], Any]], Callable[[], None] | None]:
    """Return a part's steps in two states, and what has to run before each timed one.

    A loader with threads of its own prepares batches while the other side of a pair runs, and
    would be given them for nothing: its side is used up first, untimed.
    """
    steps = script.step(part, before), script.step(part, after)
    states = zip(steps, (before, after), strict=True)
    ahead = [step for step, state in states if part == "train" and state.dali]

    def use_up() -> None:
        for step in ahead:
            for _ in range(_AHEAD):
                step()

    return steps, use_up if ahead else None
