"""Can DALI prepare batches for the network, and are they what torchvision would give?

    decode -> (random crop or resize and centre crop) -> flip -> normalise

runs in DALI's own threads, ahead of the training loop, on the CPU or on a CUDA device:

    pipeline = image_pipeline("photos", size=224, batch_size=32, train=True)
    loader = DALILoader(pipeline, seed=0)          # stands where a torch DataLoader would stand
    for images, targets in loader:                 # float32 [N, 3, 224, 224], int64 [N]
        ...

The pixels are torchvision's to within rounding, for every file that Pillow can read: what DALI
would decode to another picture, Pillow decodes (:mod:`dlhelpers.dali_io.formats`). DALI's own
resize and crop keep fractional sizes (``subpixel_scale``), or round them to the nearest, and round
the crop's corner otherwise, and so lie up to a pixel beside torchvision's; here the window is
computed by torchvision's rules. Only the outermost pixels of random crops differ by more: there
DALI's resize repeats the crop's edge, torchvision's does not (for the eval pipeline
:mod:`dlhelpers.dali_io.edges` corrects it). The order is that of torch's DistributedSampler; crops
and flips depend on seed and epoch alone.

DALI is optional (Linux only); :func:`torchvision_transform` is the same pipeline for everywhere
else.

Source: NVIDIA DALI documentation; torchvision's reference training scripts.
"""

from dlhelpers.dali_io.graph import ImagePipeline, image_pipeline
from dlhelpers.dali_io.loader import DALILoader
from dlhelpers.dali_io.prefetch import CudaPrefetcher
from dlhelpers.dali_io.sources import ImageError, has_dali
from dlhelpers.dali_io.transforms import torchvision_transform

__all__ = [
    "CudaPrefetcher",
    "DALILoader",
    "ImageError",
    "ImagePipeline",
    "has_dali",
    "image_pipeline",
    "torchvision_transform",
]
