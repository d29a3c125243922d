"""Which optional packages are there, and which extra brings one that is missing?"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["EXTRAS", "install_hint", "need"]

EXTRAS: dict[str, tuple[str, ...]] = {  # extra -> the packages that it brings, as pip names them
    "lmdb": ("lmdb", "pillow"),
    "codecs": ("simplejpeg", "opencv-python-headless", "torchcodec", "isal"),
    "dali": ("nvidia-dali-cuda130", "torchvision", "pillow"),
    "engines": ("onnx", "onnxruntime", "onnxscript", "openvino"),
    "quant": ("torchao",),
    "profiling": ("line_profiler", "pyinstrument", "snakeviz"),
    "plots": ("matplotlib",),
    "ray": ("ray",),
    "stores": ("h5py", "tfrecord", "webdataset"),
    "torchdata": ("torchdata",),
}
_OF_THE_COURSE = ("scikit-learn", "nbclient", "nbformat", "filelock", "ipykernel", "ipywidgets")
_PACKAGES = {  # what is imported -> the package, where that has another name
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "nvidia": "nvidia-dali-cuda130",
    "sklearn": "scikit-learn",
    "tornado": "snakeviz",
}


def need(module: str, who: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: as one imports it, such as ``PIL.Image``.
        who: what needs it, the subject of the message.

    Raises:
        ImportError: it cannot be imported; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        is_absent = getattr(error, "name", None) in (module, module.partition(".")[0])
        why = "" if is_absent else f" ({error})"
        raise ImportError(f"{who} needs {module}{why}: {install_hint(module)}") from error


def install_hint(module: str) -> str:
    """Return the command that installs an optional module.

    >>> install_hint("cv2")
    'pip install "dlhelpers[codecs]"'
    >>> install_hint("elsewhere")
    'pip install elsewhere'
    """
    top = module.partition(".")[0]
    package = _PACKAGES.get(top, top)
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    if package in _OF_THE_COURSE:
        extra = "course"
    return f'pip install "dlhelpers[{extra}]"' if extra else f"pip install {package}"
