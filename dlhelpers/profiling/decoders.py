"""Does a function decode pictures, video or sound? Its library says so, never its name alone.

``decode`` is also what boxes, tokens, beams and latents are passed through, so a function counts
only where it belongs to a library that is known to decode files. Python's own stacks do not show
what is written in C; such functions stand behind one of this file while a step is watched.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from dlhelpers.patching import patched
from dlhelpers.profiling.sampling import Line

__all__ = ["decoders_shown", "decodes"]

# part of a file's path -> the functions there that read or decode
_LIBRARIES = {
    "/PIL/": r"_?open|load|decode|draft",
    "/torchvision/io/": r"decode_\w+|_?read_\w+|__next__",
    "/torchvision/datasets/folder.py": r"default_loader|pil_loader|accimage_loader",
    "/torchcodec/": r"get_\w+|__getitem__|decode\w*|__init__",
    "/torchaudio/": r"load|load_with_torchcodec|_load\w*",
    "/imageio/": r"\w*read\w*|imopen|get_data|get_next_data",
    "/imageio_ffmpeg/": r"read_frames",
    "/skimage/io/": r"imread\w*",
    "/matplotlib/image.py": r"imread",
    "/tifffile/": r"imread|asarray|decode",
    "/turbojpeg.py": r"decode\w*",
    "/simplejpeg/": r"decode_\w+",
    "/decord/": r"get_batch|next|__getitem__|seek\w*",
    "/nvidia/dali/": r"run|share_outputs|schedule_run",
    "/soundfile.py": r"read|blocks",
    "/librosa/core/audio.py": r"load",
    "/pydicom/": r"pixel_array|convert_pixel_data|decode\w*",
    "/rawpy/": r"imread|postprocess",
    "/openslide/": r"read_region",
    "/dlhelpers/lmdb_io/decoding.py": r"decode",
    "/dlhelpers/profiling/decoders.py": r"shown",
}
_FILES = re.compile("|".join(map(re.escape, _LIBRARIES)))
_NAMES = {part: re.compile(names) for part, names in _LIBRARIES.items()}
# as cProfile writes what is in C
_IN_C = re.compile(
    r"'decode' of '\w*ImagingDecoder'|\b(imread|imdecode|imreadmulti|imdecodemulti)\b"
    r"|simplejpeg.*decode_jpeg|\bimage\.(decode_\w+|read_file)\b|'(retrieve|read)' of 'cv2\."
)
_SHOWN = {
    "cv2": ("imread", "imdecode", "imreadmulti", "imdecodemulti"),
    "simplejpeg": ("decode_jpeg",),
}


def decodes(where: Line) -> bool:
    """Whether a function reads or decodes pictures, video or sound, by the library it is of.

    >>> decodes(("/site-packages/PIL/ImageFile.py", 300, "load"))
    True
    >>> decodes(("/home/me/detector/boxes.py", 12, "decode_boxes"))
    False
    """
    file, _, name = where
    if file in ("~", ""):
        return bool(_IN_C.search(name))
    found = _FILES.search(file.replace("\\", "/"))
    return bool(found and _NAMES[found[0]].fullmatch(name))


@contextmanager
def decoders_shown() -> Iterator[None]:
    """Let stacks show the decoders in C of modules that are imported, inside the ``with`` block.

    A name that a program took out of its module before (``from cv2 import imread``) stays unseen.
    """
    with ExitStack() as stack:
        for module in filter(None, map(sys.modules.get, _SHOWN)):
            for name in _SHOWN[module.__name__]:
                if callable(getattr(module, name, None)):
                    stack.enter_context(patched(module, name, shown))
        yield


def shown(decoder: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a decoder in C; a stack shows this function, whose name ``decodes`` knows."""
    return decoder(*args, **kwargs)
