"""Steps of healthy programs, each in the manner of a field, for ``check``, ``guard``, ``diagnose``.

Each function returns a Program: a step that fetches its own batch, and what ``check`` is given.
``PROGRAMS`` names them all.
"""

import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset


@dataclass(frozen=True)
class Program:
    step: Callable[[], Any]
    model: object = None
    loss: object = None
    targets: object = None
    inputs: object = None


def convolutions(classes=10, channels=32):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, 2, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes),
    )  # fmt: skip


def perceptron(*widths):
    layers = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def adam(*modules, lr=1e-3):
    parameters = [p for module in modules for p in module.parameters()]
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def forever(loader):
    while True:
        yield from loader


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def classifier():
    model, images, labels = convolutions(), torch.rand(32, 3, 32, 32), torch.randint(0, 10, (32,))
    optimizer = adam(model)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def step():
        outputs = model(images)
        update(optimizer, loss(outputs, labels))
        return (outputs.detach().argmax(1) == labels).float().mean()

    return Program(step, model, loss, labels, images)


def tags():
    model, images = convolutions(6), torch.rand(32, 3, 32, 32)
    targets = torch.randint(0, 2, (32, 6)).float()
    optimizer, loss = adam(model), nn.BCEWithLogitsLoss(pos_weight=torch.rand(6) + 1)
    step = lambda: update(optimizer, loss(model(images), targets))  # noqa: E731
    return Program(step, model, loss, targets, images)


def soft_dice(logits, mask):
    p = logits.sigmoid()
    return 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)


def segmentation():
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 1, 3, padding=1))
    images, mask = torch.rand(8, 3, 48, 48), (torch.rand(8, 1, 48, 48) > 0.7).float()
    optimizer = adam(model)

    def loss(logits, mask):
        return soft_dice(logits, mask) + F.binary_cross_entropy_with_logits(logits, mask)

    step = lambda: update(optimizer, loss(model(images), mask))  # noqa: E731
    return Program(step, model, loss, mask, images)


class Language(nn.Module):
    def __init__(self, words=200, width=48):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(width, words)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.words(x) + self.places.weight[: x.shape[1]]
        return self.head(self.body(hidden, mask=mask, is_causal=True)).transpose(1, 2)


def language_model():
    model, text = Language(), torch.randint(1, 200, (8, 33))
    optimizer, loss = adam(model), nn.CrossEntropyLoss(ignore_index=0)
    targets = text[:, 1:].masked_fill(torch.rand(8, 32) < 0.1, 0)
    step = lambda: update(optimizer, loss(model(text[:, :-1]), targets))  # noqa: E731
    return Program(step, model, loss, targets, text[:, :-1])


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.rnn = nn.Embedding(100, 32), nn.LSTM(32, 48, batch_first=True)
        self.head = nn.Linear(48, 4)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.words(x), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.rnn(packed)[1][0][-1])


def reader():
    model, text, labels = Reader(), torch.randint(0, 100, (16, 20)), torch.randint(0, 4, (16,))
    lengths = torch.randint(5, 21, (16,))
    optimizer, loss = adam(model), nn.CrossEntropyLoss(weight=torch.rand(4) + 0.5)

    def step():
        optimizer.zero_grad()
        loss(model(text, lengths), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Program(step, model, loss, labels, (text, lengths))


def gradient_penalty():
    """A Wasserstein critic with its penalty, and the generator."""
    generator, critic = perceptron(16, 128, 64), perceptron(64, 128, 1)
    fast, slow = adam(critic), adam(generator)

    def step():
        real, fake = torch.randn(64, 64), generator(torch.randn(64, 16))
        mixed = torch.lerp(real, fake.detach(), torch.rand(64, 1)).requires_grad_()
        (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).pow(2).mean()
        update(fast, critic(fake.detach()).mean() - critic(real).mean() + 10 * penalty)
        update(slow, -critic(fake).mean())

    return Program(step)


def two_views():
    """Contrastive learning of two views, normalised, with a temperature."""
    model, x = perceptron(64, 128, 32), torch.randn(64, 64)
    optimizer, labels = adam(model), torch.arange(64)

    def step():
        a = F.normalize(model(x + 0.1 * torch.randn_like(x)), dim=1)
        b = F.normalize(model(x + 0.1 * torch.randn_like(x)), dim=1)
        logits = a @ b.T / 0.1
        update(optimizer, (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)

    return Program(step)


def metric_learning():
    model, x = perceptron(64, 128, 32), torch.randn(3, 48, 64)
    optimizer = adam(model)

    def step():
        anchor, near, far = (F.normalize(model(part), dim=1) for part in x)
        update(optimizer, F.triplet_margin_loss(anchor, near, far, margin=0.2))

    return Program(step)


def speech():
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 12), nn.LogSoftmax(2))
    sound, targets = torch.randn(50, 8, 20), torch.randint(1, 12, (8, 10))
    lengths = torch.full((8,), 50), torch.randint(4, 11, (8,))
    optimizer, loss = adam(model), nn.CTCLoss(zero_infinity=True)
    step = lambda: update(optimizer, loss(model(sound), targets, *lengths))  # noqa: E731
    return Program(step, model, loss, (targets, *lengths), sound)


def q_learning():
    """A value network with a target network and a memory of past transitions."""
    model, target = perceptron(8, 64, 64, 4), perceptron(8, 64, 64, 4)
    target.load_state_dict(model.state_dict())
    memory = deque((torch.randn(17) for _ in range(256)), maxlen=256)
    optimizer = adam(model)

    def step():
        memory.append(torch.randn(17))
        batch = torch.stack(random.sample(memory, 64))
        states, rewards, following = batch.split([8, 1, 8], dim=1)
        actions = torch.randint(0, 4, (64, 1))
        with torch.no_grad():
            wanted = rewards + 0.99 * target(following).max(1, keepdim=True).values
        update(optimizer, F.smooth_l1_loss(model(states).gather(1, actions), wanted))
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(model.parameters()), 0.01)

    return Program(step)


def rollout():
    """Sixteen moves of an agent, each from the state that the former one led to."""
    policy = perceptron(4, 32, 2)
    optimizer, dynamics = adam(policy), torch.randn(4, 4) / 4

    def step():
        state, gains = torch.randn(1, 4), []
        for _ in range(16):
            choice = torch.distributions.Categorical(logits=policy(state))
            action = choice.sample()
            state = torch.tanh(state @ dynamics + action[:, None])
            gains.append(choice.log_prob(action) * state[:, 0].detach())
        update(optimizer, -torch.cat(gains).mean())

    return Program(step)


def mean_teacher():
    model, teacher = perceptron(64, 128, 10), perceptron(64, 128, 10)
    optimizer, x, labels = adam(model), torch.randn(64, 64), torch.randint(0, 10, (64,))

    def step():
        with torch.no_grad():
            wanted = teacher(x + 0.1 * torch.randn_like(x)).softmax(1)
        logits = model(x)
        consistency = F.mse_loss(logits.softmax(1), wanted)
        update(optimizer, F.cross_entropy(logits, labels) + consistency)
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 0.01)

    return Program(step)


def distillation():
    teacher, model = perceptron(64, 128, 10).eval(), perceptron(64, 32, 10)
    optimizer, x, labels = adam(model), torch.randn(64, 64), torch.randint(0, 10, (64,))

    def loss(logits, labels):
        with torch.no_grad():
            soft = (teacher(x) / 4).softmax(1)
        near = F.kl_div((logits / 4).log_softmax(1), soft, reduction="batchmean") * 16
        return 0.5 * near + 0.5 * F.cross_entropy(logits, labels)

    step = lambda: update(optimizer, loss(model(x), labels))  # noqa: E731
    return Program(step, model, loss, labels, x)


def focal(logits, targets):
    ce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


def decode_boxes(offsets, anchors):
    centre = anchors[:, :2] + offsets[:, :2] * anchors[:, 2:]
    size = anchors[:, 2:] * offsets[:, 2:].clamp(max=4).exp()
    return torch.cat([centre - size / 2, centre + size / 2], 1)


def detection():
    body = nn.Sequential(nn.Conv2d(3, 32, 3, 2, padding=1), nn.ReLU())
    kinds, boxes = nn.Conv2d(32, 3, 1), nn.Conv2d(32, 4, 1)
    images, anchors = torch.rand(4, 3, 64, 64), torch.rand(4 * 32 * 32, 4)
    targets, wanted = torch.randint(0, 2, (4, 3, 32, 32)).float(), torch.rand(4 * 32 * 32, 4)
    optimizer = adam(body, kinds, boxes)

    def step():
        features = body(images)
        offsets = boxes(features).permute(0, 2, 3, 1).reshape(-1, 4)
        near = F.smooth_l1_loss(decode_boxes(offsets, anchors), wanted)
        update(optimizer, focal(kinds(features), targets) + near)

    return Program(step, nn.Sequential(body, kinds), focal, targets, images)


class Writer(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.cell = nn.Embedding(50, 32), nn.GRUCell(32, 64)
        self.head = nn.Linear(64, 50)

    def forward(self, word, state):
        state = self.cell(self.words(word), state)
        return self.head(state).argmax(1), state


def writing():
    """Each word is written after the one before it."""
    model = Writer().eval()

    def step():
        with torch.inference_mode():
            word, state = torch.zeros(8, dtype=torch.long), torch.zeros(8, 64)
            for _ in range(20):
                word, state = model(word, state)
        return word

    return Program(step)


def diffusion():
    """A network that learns to remove noise, and one sample of it."""
    model, x = perceptron(65, 128, 128, 64), torch.randn(64, 64)
    optimizer = adam(model)

    def step():
        noise, t = torch.randn_like(x), torch.rand(64, 1)
        noisy = (1 - t).sqrt() * x + t.sqrt() * noise
        update(optimizer, F.mse_loss(model(torch.cat([noisy, t], 1)), noise))
        with torch.no_grad():
            sample = torch.randn(1, 64)
            for t in torch.linspace(1, 0.1, 10):
                sample = sample - 0.1 * model(torch.cat([sample, t.view(1, 1)], 1))
        return sample

    return Program(step)


def physics():
    """The residual of a differential equation, by two derivatives of the network."""
    model = nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    optimizer = adam(model)

    def step():
        x = torch.rand(256, 1, requires_grad=True)
        y = model(x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        update(optimizer, (second + y).pow(2).mean() + (model(torch.zeros(1, 1)) - 1).pow(2).mean())

    return Program(step)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 4)
        self.experts = nn.ModuleList(perceptron(64, 64, 10) for _ in range(4))

    def forward(self, x):
        weights = self.router(x).softmax(1)
        parts = torch.stack([expert(x) for expert in self.experts], 1)
        return (weights[:, :, None] * parts).sum(1)


def experts():
    model, x, labels = Experts(), torch.randn(128, 64), torch.randint(0, 10, (128,))
    optimizer, loss = adam(model), nn.CrossEntropyLoss()
    step = lambda: update(optimizer, loss(model(x), labels))  # noqa: E731
    return Program(step, model, loss, labels, x)


def sharpness_aware():
    """Two forward passes on one batch, the weights moved between them."""
    model, x, labels = perceptron(64, 256, 10), torch.randn(64, 64), torch.randint(0, 10, (64,))
    optimizer = adam(model)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        weights = list(model.parameters())
        moves = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in weights]
        with torch.no_grad():
            torch._foreach_add_(weights, moves)
        update_loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        update_loss.backward()
        with torch.no_grad():
            torch._foreach_sub_(weights, moves)
        optimizer.step()

    return Program(step)


def from_memory():
    """A data set that is a tensor, through a loader without workers."""
    data = TensorDataset(torch.rand(512, 3, 32, 32), torch.randint(0, 10, (512,)))
    batches, model = forever(DataLoader(data, 32, shuffle=True)), convolutions()
    optimizer = adam(model)

    def step():
        images, labels = next(batches)
        update(optimizer, F.cross_entropy(model(images), labels))

    return Program(step)


def graph_network():
    """Messages along edges, summed at nodes."""
    first, second = nn.Linear(32, 64), nn.Linear(64, 5)
    nodes, edges = torch.randn(400, 32), torch.randint(0, 400, (2, 3000))
    labels, known = torch.randint(0, 5, (400,)), torch.rand(400) < 0.5
    optimizer = adam(first, second)

    def gather(x):
        return x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])

    def step():
        logits = second(gather(F.relu(first(gather(nodes)))))
        update(optimizer, F.cross_entropy(logits[known], labels[known]))

    return Program(step)


def uncertainty():
    model, x = perceptron(16, 128, 2), torch.randn(128, 16)
    targets, optimizer = torch.randn(128, 1), adam(model)

    def loss(outputs, targets):
        mean, raw = outputs.chunk(2, 1)
        return F.gaussian_nll_loss(mean, targets, F.softplus(raw) + 1e-6)

    step = lambda: update(optimizer, loss(model(x), targets))  # noqa: E731
    return Program(step, model, loss, targets, x)


def learning_to_learn():
    """One step within a step, through its gradient."""
    model, optimizer_x = perceptron(16, 64, 1), torch.randn(2, 64, 16)
    targets, optimizer = torch.randn(2, 64, 1), adam(model)

    def step():
        weights = dict(model.named_parameters())
        inner = F.mse_loss(functional_call(model, weights, (optimizer_x[0],)), targets[0])
        grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        moved = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), grads, strict=True)}
        outer = F.mse_loss(functional_call(model, moved, (optimizer_x[1],)), targets[1])
        update(optimizer, outer)

    return Program(step)


PROGRAMS = (
    classifier, tags, segmentation, language_model, reader, gradient_penalty, two_views,
    metric_learning, speech, q_learning, rollout, mean_teacher, distillation, detection, writing,
    diffusion, physics, experts, sharpness_aware, from_memory, graph_network, uncertainty,
    learning_to_learn,
)  # fmt: skip
