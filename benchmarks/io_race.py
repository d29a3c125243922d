"""Make, check, time and print the rows of a table, for benchmarks/io.py."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from io_peers import BATCH, Photos

from dlhelpers.measure import Comparison, compare_many

Make = Callable[[], Callable[[], Any]]
INSTALL = {
    "ffcv": "ffcv, which builds where OpenCV's and libturbojpeg's development files are",
    "streaming": "mosaicml-streaming, which holds NumPy below 2.2",
    "webdataset": "webdataset",
    "tfrecord": "tfrecord",
    "litdata": "litdata",
    "h5py": "h5py",
    "spdl": "spdl, which needs FFmpeg's shared libraries",
}
Check = Callable[[Any], str]


class RowError(RuntimeError):
    """A row failed while it was timed."""


@dataclass
class Bench:
    """The tables so far, and what the command line asked for."""

    budget_s: float
    wanted: str
    tables: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[tuple[str, str], Comparison] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def race(
        self,
        title: str,
        makers: Mapping[str, Make],
        images: int,
        check: Check,
        *,
        threshold: float | None = 1.0,
        seconds: float = 1.0,
        setup: Callable[[], Any] | None = None,
    ) -> None:
        """Make, check and time the rows against the first; ``seconds`` scales the budget."""
        baseline, notes, calls = next(iter(makers)), {}, {}
        names = [n for n in makers if n == baseline or self.wanted in n]
        print(f"\n{title}", flush=True)
        if len(names) < 2:
            return
        for name in names:
            try:
                call = makers[name]()
                if setup is not None:
                    setup()
                notes[name] = check(call())
                calls[name] = _named(name, call)
            except Exception as error:  # a peer may raise anything
                self._not_measured(title, name, error)
        while len(calls) > 1 and baseline in calls:
            try:
                found = compare_many(
                    calls,
                    baseline=baseline,
                    budget_s=seconds * self.budget_s,
                    threshold=threshold,
                    setup=setup,
                )
                break
            except RowError as error:
                name = error.args[0]
                del calls[name]
                self._not_measured(title, name, error.__cause__ or error)
        else:
            return
        first = next(iter(found.values())).baseline_s
        print(f"  {baseline:<42}{images / first:>9,.0f}/s   1 (baseline){'':26}{notes[baseline]}")
        rows = [{"name": baseline, "images_s": images / first, "note": notes[baseline]}]
        for name, row in found.items():
            ratio = f"{row.speedup:6.3f} [{row.low:.3f}, {row.high:.3f}]"
            speed = images / row.candidate_s
            print(
                f"  {name:<42}{speed:>9,.0f}/s {ratio:<24}{row.outcome:<14}{notes[name]}",
                flush=True,
            )
            self.rows[title[:2].strip(), name] = row
            kept = ("speedup", "low", "high", "outcome", "pairs", "elapsed_s")
            rows.append(
                {"name": name, "images_s": speed, "note": notes[name]}
                | {key: getattr(row, key) for key in kept}
            )
        self.tables.append({"title": title, "baseline": baseline, "rows": rows})
        gc.collect()

    def _not_measured(self, title: str, name: str, error: BaseException) -> None:
        why = _why(error)
        why = why if len(why) < 150 else why[:147] + "..."
        print(f"  {name:<42}not measured ({why})", flush=True)
        gc.collect()
        self.failed.append(f"{title[:2].strip()} {name}: {why}")


def _why(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in INSTALL:
        return f"pip install {INSTALL[error.name]}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def _named(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def named() -> Any:
        try:
            return call()
        except Exception as error:
            raise RowError(name) from error

    return named


class Reference:
    """Knows each image by its thumbnail, so that any order can be checked."""

    def __init__(self, photos: Photos) -> None:
        self.photos = photos
        self.small = torch.stack([self._thumbnail(torch.from_numpy(p)) for p in photos.pixels])

    def __call__(self, result: Any) -> str:
        images, targets = _unpacked(result)
        if len(images) != BATCH:
            raise ValueError(f"{len(images)} images instead of {BATCH}")
        seen, worst, total = set(), 0, 0.0
        for image, target in zip(images, targets, strict=True):
            if image.dtype != torch.uint8 or image.shape[0] != 3:
                raise ValueError(f"{image.dtype} {tuple(image.shape)} instead of uint8 [3, H, W]")
            pixels = image.permute(1, 2, 0)
            found = int((self.small - self._thumbnail(pixels)).square().sum(1).argmin())
            if int(target) != self.photos.targets[found]:
                raise ValueError(f"target {int(target)} for image {found}")
            off = (pixels.short() - torch.from_numpy(self.photos.pixels[found]).short()).abs()
            seen.add(found)
            worst, total = max(worst, int(off.max())), total + float(off.float().mean())
        if len(seen) < BATCH or total / BATCH > 2:
            raise ValueError(f"{len(seen)} different images, mean error {total / BATCH:.2f}")
        return f"off PIL by {total / BATCH:.2f}, at most {worst}"

    @staticmethod
    def _thumbnail(pixels: torch.Tensor) -> torch.Tensor:
        planes = pixels.permute(2, 0, 1)[None].float()
        return torch.nn.functional.adaptive_avg_pool2d(planes, 16).flatten()


def _unpacked(result: Any) -> tuple[Any, Any]:
    if isinstance(result, list):
        return [image for image, _ in result], [target for _, target in result]
    return result[0], result[1]


def epoch_check(count: int, check: Check) -> Check:
    def checked(result: Any) -> str:
        if result[0] != count:
            raise ValueError(f"{result[0]} images instead of {count}")
        return check(result[1])

    return checked


def check_training(result: Any) -> str:
    images, targets = result
    if images.shape != (BATCH, 3, 224, 224) or images.dtype != torch.float32:
        raise ValueError(f"{images.dtype} {tuple(images.shape)}")
    if len(targets) != BATCH or not 0.3 < images.std() < 3:
        raise ValueError(f"standard deviation {images.std():.2f}")
    return f"std {images.std():.2f}"
