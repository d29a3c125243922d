"""Which experiments does this machine enable, and what would enable the others?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dlhelpers import machine
from dlhelpers.tables import html_table, text_table

__all__ = ["Light", "Lights", "lights_up"]

_EXTRAS = {
    "dali": ("DALI", "preprocessing by DALI in 03, and in the script of 08"),
    "codecs": ("other decoders of images", "OpenCV, simplejpeg and torchcodec in 02"),
    "stores": ("other containers", "TFRecord, HDF5 and WebDataset in 02"),
    "engines": ("ONNX Runtime, OpenVINO", "their backends in 06 and 07, and in the script of 08"),
    "quant": ("torchao", "its backends in 07"),
    "profiling": ("line_profiler, pyinstrument", "two more profilers in 08"),
}
_NO_BUILD = {("torchcodec", "win32")}  # the extra leaves it out there
_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "neon_dotprod", "i8mm"}
_BF16 = {"avx512_bf16", "amx_bf16", "neon_bf16"}


@dataclass(frozen=True)
class Light:
    """Something that a machine may have.

    Attributes:
        name: what it is.
        on: whether it is here.
        lights: what it enables, by the numbers of notebooks.
        get: how one comes by it.
    """

    name: str
    on: bool
    lights: str
    get: str


class Lights(list[Light]):
    """What a machine enables; shows itself as a table."""

    def _table(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        rows = [
            [light.name, "yes" if light.on else "no", light.lights, "" if light.on else light.get]
            for light in self
        ]
        return ["with", "here", "enables", "how to get it"], rows

    def __str__(self) -> str:
        return text_table(*self._table(), names=4)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._table(), names=4)


def lights_up() -> Lights:
    """Return what the course can use beyond a processor and torch, and what of it is here.

    Nothing of it is needed: where it is missing, the experiment says *not measured*, or goes
    without.
    """
    here = machine.describe()
    lights = [
        Light(
            "an NVIDIA GPU",
            bool(here.cuda_devices),
            "experiments on CUDA in 01, 03, 04 and 08",
            "another machine",
        ),
        Light(
            "int8 instructions",
            bool(_INT8 & set(here.simd)),
            "int8 that can be fast in 07",
            "another processor",
        ),
        Light(
            "bfloat16 instructions",
            bool(_BF16 & set(here.simd)),
            "low precision that can be fast in 04",
            "another processor",
        ),
        Light(
            "a C++ compiler",
            here.compiler is not None,
            "torch.compile in 06",
            "the system's package, such as g++",
        ),
    ]
    for extra, (name, what) in _EXTRAS.items():
        exists = extra != "dali" or sys.platform == "linux"
        get = f'pip install "dlhelpers[{extra}]"' if exists else "a machine with Linux"
        found = here.extras[extra].items()
        on = all(v is not None or (package, sys.platform) in _NO_BUILD for package, v in found)
        lights.append(Light(name, on, what, get))
    return Lights(lights)
