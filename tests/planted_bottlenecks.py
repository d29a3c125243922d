"""Loops of training or evaluation, each with one bottleneck, and some that waste nothing.

What is planted costs more than five times the noise of a step.
"""

import io
import itertools
import random

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as G


def network(channels=16, size=32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


def forever(loader):
    while True:
        yield from loader


def in_memory(count=64, batch=16, size=32):
    images = torch.rand(count, 3, size, size)
    labels = torch.randint(0, 10, (count,))
    batches = [(images[i : i + batch], labels[i : i + batch]) for i in range(0, count, batch)]
    return itertools.cycle(batches)


def training(batches, model=None, look=None):
    model = model or network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        images, labels = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if look is not None:
            look(loss, model)

    return step


def jpeg(size):
    pixels = torch.nn.functional.interpolate(
        torch.rand(1, 3, size // 8, size // 8), size=size, mode="bilinear"
    )[0]
    buffer = io.BytesIO()
    G.to_pil_image(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class Jpegs(Dataset):
    def __init__(self, size, count=512, crop=32):
        self.files, self.count, self.crop = [jpeg(size) for _ in range(4)], count, crop

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = Image.open(io.BytesIO(self.files[index % 4])).convert("RGB")
        left = random.randrange(image.width - self.crop + 1)
        image = image.crop((left, 0, left + self.crop, self.crop))
        return G.to_dtype(G.pil_to_tensor(image), scale=True), index % 10


class Tensors(Dataset):
    def __init__(self, size=32, count=512):
        self.images, self.count = torch.rand(64, 3, size, size), count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.images[index % 64], index % 10


class Blurred(Tensors):
    """The same costly and fixed transform each time."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return G.resize(G.gaussian_blur(image, [9, 9]), [32, 32]), label


def slow_decoding():
    return training(forever(DataLoader(Jpegs(1024), 16, num_workers=1)))


def no_workers():
    """A batch takes the loader about as long as a step computes."""
    return training(forever(DataLoader(Jpegs(160), 16)), network(24))


def python_loop():
    batches = in_memory(batch=16, size=24)

    def normalised():
        for images, labels in batches:
            rows = []
            for image in images:
                for channel in image:
                    rows.append((channel - channel.mean()) / channel.std())
            yield torch.stack(rows).view_as(images), labels

    return training(normalised())


def model_by_sample():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = in_memory(size=8)

    def step():
        images, labels = next(batches)
        optimizer.zero_grad()
        outputs = torch.cat([model(image[None]) for image in images])
        F.cross_entropy(outputs, labels).backward()
        optimizer.step()

    return step


def collate_by_pixel(samples):
    images = torch.empty(len(samples), *samples[0][0].shape)
    for n, (image, _) in enumerate(samples):
        for c in range(image.shape[0]):
            for y in range(image.shape[1]):
                images[n, c, y] = image[c, y]
    return [images, torch.tensor([label for _, label in samples])]


def slow_collate():
    return training(forever(DataLoader(Tensors(), 16, collate_fn=collate_by_pixel)))


def item_every_step():
    history = []

    def look(loss, model):
        for parameter in model.parameters():
            history.append([value.item() for value in parameter.grad.flatten()[:400]])
            history.clear()

    return training(in_memory(size=16), look=look)


def batch_of_one():
    return training(in_memory(batch=1, size=8), network(8))


def repeated_transforms():
    return training(forever(DataLoader(Blurred(96), 16)), network(8))


def evaluation_without_no_grad():
    model, batches = network(32).eval(), in_memory(batch=32)

    def step():
        images, labels = next(batches)
        return (model(images).argmax(1) == labels).sum()

    return step


def loss_tensors_kept():
    losses = []
    return training(in_memory(), look=lambda loss, model: losses.append(loss))


def batchnorm_unfused():
    layers = []
    for _ in range(8):
        layers += [nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(64)]
    model, batches = nn.Sequential(nn.Conv2d(3, 64, 1), *layers).eval(), in_memory()

    def step():
        images, _ = next(batches)
        with torch.inference_mode():
            return model(images)

    return step


PLANTED = {
    "slow-decoding": slow_decoding,
    "no-workers": no_workers,
    "python-loop": python_loop,
    "slow-collate": slow_collate,
    "item-every-step": item_every_step,
    "batch-of-one": batch_of_one,
    "repeated-transforms": repeated_transforms,
    "evaluation-without-no-grad": evaluation_without_no_grad,
    "loss-tensors-kept": loss_tensors_kept,
    "batchnorm-unfused": batchnorm_unfused,
}


def tuned_training():
    return training(in_memory(batch=32), network(24))


def tuned_loading():
    """The loader has a worker and little to do; the step computes for longer."""
    return training(forever(DataLoader(Tensors(), 16, num_workers=1)), network(48))


def tuned_evaluation():
    from dlhelpers.fusion import fuse_conv_bn

    batches = in_memory(batch=32)
    model, _ = fuse_conv_bn(network(32), next(batches)[0][:2])

    def step():
        images, labels = next(batches)
        with torch.inference_mode():
            return (model(images).argmax(1) == labels).sum()

    return step


def tuned_clipping():
    """Fused updates, clipped gradients, and a moving average of the weights."""
    model, batches = network(24), in_memory(batch=16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    average = [p.detach().clone() for p in model.parameters()]

    def step():
        images, labels = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 0.01)

    return step


def tuned_layers():
    """Layers that are called one by one, in no module of their own."""
    layers, batches = list(network(24)), in_memory(batch=32)
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.01)

    def step():
        x, labels = next(batches)
        optimizer.zero_grad()
        for layer in layers:
            x = layer(x)
        F.cross_entropy(x, labels).backward()
        optimizer.step()

    return step


TUNED = {
    "training": tuned_training,
    "loading": tuned_loading,
    "evaluation": tuned_evaluation,
    "clipping": tuned_clipping,
    "layers": tuned_layers,
}
