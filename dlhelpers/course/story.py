"""A slow script, as people write them: it trains on photographs, validates, and scores a folder.

Each field of :class:`Settings` is one habit that costs time or memory, and can be mended by itself;
``STEPS`` is the order in which notebook 08 mends them, asking a profile before all but the first.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import functional as G

from dlhelpers.dali_io.sources import has_dali

__all__ = ["STEPS", "Photos", "Script", "ScriptRun", "Settings", "after", "forever"]

SIDE = 48  # of the images that the network sees
BATCH = 16
LEARNING_RATE = 0.002
TARGET = 0.75  # accuracy on the validation photographs, at which training ends


@dataclass(frozen=True)
class Settings:
    """The habits; each default is the slow one.

    Attributes:
        softmax: the network ends in Softmax, in front of a loss that has its own.
        database: photographs come from an LMDB database of small ones, not from large files.
        stack: a batch is put together by one call.
        dali: batches are prepared by DALI's threads; by a worker process where there is no DALI.
        no_grad: validation keeps neither graphs nor losses.
        score_batch: photographs that are scored at a time.
        fold: BatchNorms are folded before scoring.
        int8: scoring takes the fastest road that ``quantize_static`` finds.
        draft: scoring decodes photographs at a smaller scale, as JPEG allows.
    """

    softmax: bool = True
    database: bool = False
    stack: bool = False
    dali: bool = False
    no_grad: bool = False
    score_batch: int = 1
    fold: bool = False
    int8: bool = False
    draft: bool = False


STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "as found": ("", {}),
    "logits into the loss": ("01_pairing", {"softmax": False}),
    "one call stacks a batch": ("08_profiling", {"stack": True}),
    "small photographs in LMDB": ("02_lmdb_io", {"database": True}),
    "DALI prepares batches": ("03_dali_io", {"dali": True}),
    "validation without graphs": ("04_memory", {"no_grad": True}),
    "scoring in batches": ("08_profiling", {"score_batch": BATCH}),
    "photographs decoded small": ("02_lmdb_io", {"draft": True}),
    "BatchNorm folded": ("06_fusion", {"fold": True}),
    "the fastest road": ("07_quantization", {"int8": True}),
}  # step -> the notebook that treats it, and what changes


def after(step: str) -> Settings:
    """Return the settings once this step and all before it are done.

    Raises:
        ValueError: there is no such step.

    >>> after("logits into the loss").softmax
    False
    """
    if step not in STEPS:
        raise ValueError(f"there is no step {step!r}; there are {', '.join(STEPS)}")
    settings = Settings()
    for name, (_, changes) in STEPS.items():
        settings = dataclasses.replace(settings, **changes)
        if name == step:
            break
    return settings


def write_parts(folder: Path, count: int, side: int, seed: int) -> Path:
    """Write crops of six parts of each photograph as JPEG files, one class a part."""
    from sklearn.datasets import load_sample_images

    draw = random.Random(seed)
    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(count):
        part = number % (6 * len(pictures))
        picture, row, column = pictures[part // 6], part % 6 // 3, part % 3
        height, width = picture.height // 2, picture.width // 3
        edge = draw.randint(height * 2 // 3, height)
        left = column * width + draw.randint(0, width - edge)
        top = row * height + draw.randint(0, height - edge)
        crop = picture.crop((left, top, left + edge, top + edge)).resize((side, side))
        file = folder / f"part-{part:02}" / f"{number:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        crop.save(file, quality=90)
    return folder


class Photos(Dataset):
    """The files of an image folder, decoded each time: (image [3, 48, 48], class)."""

    def __init__(self, folder: Path, draft: bool = False) -> None:
        self.draft = draft
        self.files = sorted(folder.rglob("*.jpg"))
        self.classes = sorted({file.parent.name for file in self.files})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_tensor(self.small(index)), self.label(index)

    def small(self, index: int) -> Any:
        """Return the decoded photograph, 48 pixels high and wide."""
        image = Image.open(self.files[index])
        if self.draft:
            image.draft("RGB", (SIDE, SIDE))  # the decoder leaves detail out, and does less
        return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)

    def label(self, index: int) -> int:
        """Return the number of its class."""
        return self.classes.index(self.files[index].parent.name)


class Small(Photos):
    """The same as pictures, which a database stores."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.small(index), self.label(index)


def to_tensor(image: Any) -> Tensor:
    """Return float32 [3, H, W] between -1 and 1."""
    return (G.to_dtype(G.to_image(image), torch.float32, scale=True) - 0.5) / 0.5


def collate_by_list(samples: list[tuple[Tensor, int]]) -> list[Tensor]:
    """Put a batch together by way of lists of numbers, as a search for an error message advises."""
    images = torch.tensor([image.tolist() for image, _ in samples])
    return [images, torch.tensor([label for _, label in samples])]


def network(classes: int, softmax: bool, seed: int = 0) -> nn.Sequential:
    """Return a small convolutional network with BatchNorm; the same weights for the same seed."""

    def block(c1: int, c2: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(c1, c2, 3, stride, 1, bias=False)
        return [conv, nn.BatchNorm2d(c2), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [*block(3, 16, 2), *block(16, 32, 2), *block(32, 64, 1), *block(64, 64, 2)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
        return nn.Sequential(*layers, *[nn.Softmax(dim=1)] * softmax)


def train_batch(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """Take one step on a batch."""
    images, labels = batch
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def validate(model: nn.Module, batches: Any, no_grad: bool) -> float:
    """Return the accuracy; the losses are kept for a curve that nobody draws."""
    model.eval()
    losses, right, seen = [], 0, 0
    with torch.set_grad_enabled(not no_grad):
        for images, labels in batches:
            outputs = model(images)
            loss = F.cross_entropy(outputs, labels)
            losses.append(loss.detach() if no_grad else loss)
            right += int((outputs.argmax(1) == labels).sum())
            seen += len(labels)
    return right / seen


def score(model: Callable[[Tensor], Tensor], photos: Photos, batch: int) -> list[int]:
    """Return the class of each photograph of a folder, in the order of its files."""
    found: list[int] = []
    with torch.inference_mode():
        for first in range(0, len(photos), batch):
            some = range(first, min(first + batch, len(photos)))
            images = torch.stack([photos[index][0] for index in some])
            outputs = torch.stack([model(view) for view in views(images)])
            found += outputs.mean(0).argmax(1).tolist()
    return found


def views(images: Tensor) -> list[Tensor]:
    """Return eight versions of a batch, moved and mirrored, over which scoring averages."""
    moved = [images.roll((y, x), (2, 3)) for y in (0, 4) for x in (0, 4)]
    return [*moved, *(view.flip(3) for view in moved)]


@dataclass(frozen=True)
class ScriptRun:
    """What a run of the script took and gave.

    Attributes:
        train_s, validate_s, score_s: seconds of its three parts.
        epochs: that training needed to reach the target, or its limit.
        accuracy: on the validation photographs, at the end.
        labels: class of each photograph that was scored.
    """

    train_s: float
    validate_s: float
    score_s: float
    epochs: int
    accuracy: float
    labels: tuple[int, ...]

    @property
    def total_s(self) -> float:
        """All three parts."""
        return self.train_s + self.validate_s + self.score_s

    def agreement(self, other: ScriptRun) -> float:
        """Return the share of photographs to which both give the same class."""
        same = sum(one == two for one, two in zip(self.labels, other.labels, strict=True))
        return same / len(self.labels)


class Script:
    """The script over a folder of photographs, which it makes; with any settings.

    Args:
        root: where the photographs and databases go.
        count: training photographs; half as many validate, and as many are scored.
        side: of the files, in pixels.
        max_epochs: where training ends at the latest.
    """

    def __init__(
        self, root: str | Path, *, count: int = 72, side: int = 256, max_epochs: int = 20
    ) -> None:
        self.root, self.max_epochs = Path(root), max_epochs
        self._roads: dict[bytes, Any] = {}
        self._trained: dict[Settings, tuple[nn.Sequential, int, float, float, float]] = {}
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
        return DataLoader(
            dataset,
            BATCH,
            shuffle=train,
            generator=torch.Generator().manual_seed(0),
            collate_fn=default_collate if settings.stack else collate_by_list,
            drop_last=train,
            num_workers=int(settings.dali),
            persistent_workers=settings.dali,
        )

    def model(self, settings: Settings) -> nn.Sequential:
        """Return the network before training."""
        return network(len(Photos(self.folders["train"]).classes), settings.softmax)

    def train_step(self, settings: Settings) -> Callable[[], None]:
        """Return one training step that fetches its own batch, without end, for a profiler."""
        model = self.model(settings).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        batches = forever(self.loader("train", settings))
        return lambda: train_batch(model, optimizer, next(batches))

    def validate_step(self, settings: Settings) -> Callable[[], None]:
        """Return a validation over all photographs."""
        model, batches = self.model(settings), list(self.loader("valid", settings))
        return lambda: validate(model, batches, settings.no_grad)

    def score_step(
        self, settings: Settings, model: nn.Module, count: int | None = None
    ) -> Callable[[], list[int]]:
        """Return the scoring of the folder, or of its first photographs, by a trained model."""
        road, photos = self.road(settings, model), Photos(self.folders["new"], settings.draft)
        photos.files = photos.files[:count]
        return lambda: score(road, photos, settings.score_batch)

    def road(self, settings: Settings, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the trained model as it is scored with: as it is, folded, or its fastest road."""
        model = model.eval()
        if not (settings.int8 or settings.fold):
            return model
        photos = Photos(self.folders["train"])
        spread = range(0, len(photos), max(1, len(photos) // 48))  # some of each class
        some = torch.stack([photos[index][0] for index in spread])
        if settings.int8:
            from dlhelpers.quantization import quantize_static

            weights = b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values())
            if weights in self._roads:  # the search takes seconds
                return self._roads[weights]
            self._roads[weights] = quantize_static(
                model, some.split(BATCH), engine=("onnxruntime", "openvino"), min_sqnr_db=25.0,
                calibrator="min-max", budget_s=0.2,
            )  # fmt: skip
            return self._roads[weights]
        from dlhelpers.fusion import fuse_conv_bn

        return fuse_conv_bn(model, some[:2])[0]

    def train(self, settings: Settings) -> tuple[nn.Sequential, int, float, float, float]:
        """Return model, epochs, accuracy, seconds of training and of validation, at the target.

        What has been trained is returned again, where settings differ in scoring alone.
        """
        scoring = {"score_batch": 1, "fold": False, "int8": False, "draft": False}
        key = dataclasses.replace(settings, **scoring)
        if key not in self._trained:
            self._trained[key] = self._train(key)
        return self._trained[key]

    def _train(self, settings: Settings) -> tuple[nn.Sequential, int, float, float, float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model(settings)
            optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
            train, valid = (self.loader(name, settings) for name in ("train", "valid"))
            for loader in (train, valid) if settings.dali and has_dali() else ():
                loader.peek()  # DALI starts once, whatever the number of epochs
            took, looked, accuracy, epoch = 0.0, 0.0, 0.0, 0
            while accuracy < TARGET and epoch < self.max_epochs:
                begin = perf_counter()
                model.train()
                for batch in train:
                    train_batch(model, optimizer, batch)
                trained = perf_counter()
                accuracy = validate(model, valid, settings.no_grad)
                epoch += 1
                took, looked = took + trained - begin, looked + perf_counter() - trained
        return model, epoch, accuracy, took, looked

    def run(self, settings: Settings) -> ScriptRun:
        """Run the whole script; what is prepared once (database, int8) is not timed.

        Training and validation are those of an earlier run where nothing of them has changed.
        """
        model, epochs, accuracy, train_s, validate_s = self.train(settings)
        scoring = self.score_step(settings, model)
        begin = perf_counter()
        labels = scoring()
        score_s = perf_counter() - begin
        return ScriptRun(train_s, validate_s, score_s, epochs, accuracy, tuple(labels))


def forever(loader: Any) -> Iterator[Any]:
    """Give the loader's batches without end, each epoch drawn anew."""
    while True:
        yield from loader
