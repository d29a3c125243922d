"""Which photographs does the script read, and how does one become a tensor?"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as G

__all__ = ["SIDE", "Photos", "Small", "collate_by_list", "to_tensor", "write_parts"]

SIDE = 48  # of the images that the network sees


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
