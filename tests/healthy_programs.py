"""Small healthy training programs, each in the manner of a well-known PyTorch example.

Each function trains a few steps on digits or on numbers of its own making and knows nothing of
the guard that watches it. ``PROGRAMS`` names them all.
"""

import functools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

BATCH = 32


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 8, 8] in [0, 1] and labels [1797]."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(data.target)


def batches(steps: int):
    images, labels = digits()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        picked = torch.randint(len(images), (BATCH,), generator=generator)
        yield images[picked], labels[picked]


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(64, 32)
        self.mean, self.log_var = nn.Linear(32, 4), nn.Linear(32, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x):
        h = F.relu(self.encoder(x.view(-1, 64)))
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        return torch.sigmoid(self.decoder(z)), mean, log_var


def variational_autoencoder(steps=6):
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for images, _ in batches(steps):
        optimizer.zero_grad()
        reconstruction, mean, log_var = model(images)
        bce = F.binary_cross_entropy(reconstruction, images.view(-1, 64), reduction="sum")
        kld = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())
        (bce + kld).backward()
        optimizer.step()


def gan(steps=6):
    generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.Tanh())
    critic = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1), nn.Sigmoid())
    criterion = nn.BCELoss()
    optimizer_d = torch.optim.Adam(critic.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    for images, _ in batches(steps):
        critic.zero_grad()
        label = torch.full((BATCH,), 1.0)
        criterion(critic(2 * images.view(-1, 64) - 1).view(-1), label).backward()
        fake = generator(torch.randn(BATCH, 8))
        label.fill_(0.0)
        criterion(critic(fake.detach()).view(-1), label).backward()
        optimizer_d.step()
        generator.zero_grad()
        label.fill_(1.0)
        criterion(critic(fake).view(-1), label).backward()
        optimizer_g.step()


def least_squares_gan_with_noisy_labels(steps=6):
    generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())
    critic = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    parameters = [*generator.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2e-4)
    for images, _ in batches(steps):
        real, fake = critic(images.flatten(1)), critic(generator(torch.randn(BATCH, 8)))
        loss = F.mse_loss(real, torch.ones_like(real)) + F.mse_loss(fake, torch.zeros_like(fake))
        noisy = 0.7 + 0.5 * torch.rand(BATCH, 1)
        loss = loss + F.binary_cross_entropy_with_logits(real, noisy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class DigitsNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.drop = nn.Dropout(0.25)
        self.fc = nn.Linear(72, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return F.log_softmax(self.fc(self.drop(torch.flatten(x, 1))), dim=1)


def digits_classifier(steps=6):
    model = DigitsNet()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    for images, labels in batches(steps):
        model.train()
        optimizer.zero_grad()
        F.nll_loss(model(images), labels).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            F.nll_loss(model(images), labels, reduction="sum").item()


def classifier_under_autocast(steps=6):
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, labels in batches(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def classifier_with_accumulation(steps=6):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    for step, (images, labels) in enumerate(batches(2 * steps)):
        (criterion(model(images), labels) / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


def regression(steps=6):
    true = torch.randn(4, 1) * 5
    fc = nn.Linear(4, 1)
    for _ in range(steps):
        x = torch.randn(BATCH, 1)
        x = torch.cat([x**power for power in range(1, 5)], 1)
        fc.zero_grad()
        loss = F.smooth_l1_loss(fc(x), x.mm(true) + 3.0)
        loss.backward()
        for parameter in fc.parameters():
            parameter.data.add_(-0.1 * parameter.grad)


def bounded_regression(steps=6):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    for _ in range(steps):
        x = torch.randn(BATCH, 4)

        def closure(x=x):
            optimizer.zero_grad()
            loss = F.mse_loss(4 * torch.sigmoid(model(x)) - 2, x[:, :1].clamp(-2, 2))
            loss.backward()
            return loss

        optimizer.step(closure)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
        self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, a, b):
        return torch.sigmoid(self.head(torch.cat((self.body(a), self.body(b)), 1)))


def siamese_network(steps=6):
    model = Siamese()
    optimizer = torch.optim.Adadelta(model.parameters())
    criterion = nn.BCELoss()
    for images, labels in batches(steps):
        order = torch.randperm(BATCH)
        same = (labels == labels[order]).float()
        optimizer.zero_grad()
        criterion(model(images, images[order]).squeeze(), same).backward()
        optimizer.step()


class WordModel(nn.Module):
    def __init__(self, words=23):
        super().__init__()
        self.words = words
        self.encoder = nn.Embedding(words, 16)
        self.rnn = nn.LSTM(16, 16)
        self.decoder = nn.Linear(16, words)

    def forward(self, x, state):
        out, state = self.rnn(self.encoder(x), state)
        return F.log_softmax(self.decoder(out).view(-1, self.words), dim=1), state


def word_language_model(steps=6):
    model, state = WordModel(), None
    criterion = nn.NLLLoss()
    text = torch.randint(23, (steps * 7 + 1, 5))
    for i in range(0, steps * 7, 7):
        model.zero_grad()
        state = None if state is None else tuple(part.detach() for part in state)
        output, state = model(text[i : i + 7], state)
        criterion(output, text[i + 1 : i + 8].view(-1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        for parameter in model.parameters():
            parameter.data.add_(parameter.grad, alpha=-20)


def transformer_language_model(steps=6):
    model = nn.Sequential(
        nn.Embedding(23, 16), nn.TransformerEncoderLayer(16, 2, 32), nn.Linear(16, 23)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        text = torch.randint(23, (4, 9))
        logits = model(text[:, :-1])
        targets = text[:, 1:].masked_fill(torch.rand(4, 8) < 0.2, -100)
        optimizer.zero_grad()
        F.cross_entropy(logits.transpose(1, 2), targets).backward()
        optimizer.step()


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.action, self.value = nn.Linear(4, 16), nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, x):
        x = F.relu(self.body(x))
        return F.softmax(self.action(x), dim=-1), self.value(x)


def policy_gradient(steps=6):
    model = Policy()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(steps):
        policy_losses, value_losses = [], []
        for _ in range(10):
            probabilities, value = model(torch.randn(4))
            action = torch.distributions.Categorical(probabilities)
            chosen = action.sample()
            reward = torch.randn(())
            policy_losses.append(-action.log_prob(chosen) * (reward - value.item()))
            value_losses.append(F.smooth_l1_loss(value, reward.view(1)))
        optimizer.zero_grad()
        (torch.stack(policy_losses).sum() + torch.stack(value_losses).sum()).backward()
        optimizer.step()


def distillation(steps=6, temperature=4.0):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    soft = nn.KLDivLoss(reduction="batchmean")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for images, labels in batches(steps):
        with torch.no_grad():
            target = F.softmax(teacher(images) / temperature, dim=1)
        logits = student(images)
        loss = soft(F.log_softmax(logits / temperature, dim=1), target) * temperature**2
        loss = 0.9 * loss + 0.1 * F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def mixup(steps=6):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, labels in batches(steps):
        targets = F.one_hot(labels, 10).float()
        share, order = torch.rand(()), torch.randperm(BATCH)
        loss = F.cross_entropy(
            model(share * images + (1 - share) * images[order]),
            share * targets + (1 - share) * targets[order],
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def segmentation(steps=6):
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    for images, _ in batches(steps):
        target = (images[:, 0] * 2.99).long()
        target[:, 0] = 255
        optimizer.zero_grad()
        criterion(model(images), target).backward()
        optimizer.step()


def binary_segmentation(steps=6):
    model = nn.Conv2d(1, 1, 3, padding=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, _ in batches(steps):
        logits, mask = model(images), (images > 0.5).float()
        p = torch.sigmoid(logits)
        dice = 1 - 2 * (p * mask).sum() / (p.sum() + mask.sum() + 1)
        optimizer.zero_grad()
        (dice + nn.BCEWithLogitsLoss()(logits, mask)).backward()
        optimizer.step()


def triplet(steps=6):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.TripletMarginLoss()
    for images, _ in batches(steps):
        z = model(images)
        optimizer.zero_grad()
        criterion(z, z.roll(1, 0), z.roll(2, 0)).backward()
        optimizer.step()


def contrastive(steps=6):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, labels in batches(steps):
        z = F.normalize(model(images), dim=1)
        near = F.normalize(model(images + 0.1 * torch.randn_like(images)), dim=1)
        same = 2 * (labels == labels.roll(1)).float() - 1
        loss = F.cross_entropy(z @ near.T / 0.1, torch.arange(BATCH))
        loss = loss + F.cosine_embedding_loss(z, z.roll(1, 0), same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ctc_reader(steps=6):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6), nn.LogSoftmax(dim=2))
    optimizer = torch.optim.Adam(model.parameters())
    criterion = nn.CTCLoss(blank=0, zero_infinity=True)
    for _ in range(steps):
        lengths = torch.randint(1, 4, (5,))
        targets = torch.randint(1, 6, (5, 4))
        optimizer.zero_grad()
        output = model(torch.randn(12, 5, 8))
        criterion(output, targets, torch.full((5,), 12), lengths).backward()
        optimizer.step()


def counts_and_variances(steps=6):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(steps):
        x = torch.randn(BATCH, 4)
        log_rate, mean, raw = model(x).unbind(1)
        loss = F.poisson_nll_loss(log_rate, torch.poisson(x[:, 0].exp()))
        loss = loss + F.gaussian_nll_loss(mean, x[:, 1], F.softplus(raw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def detector_losses(steps=6):
    """Classification with many classes beside boxes, as two-stage detectors have it."""
    body, classes, boxes = nn.Linear(16, 32), nn.Linear(32, 4), nn.Linear(32, 16)
    modules = nn.ModuleList([body, classes, boxes])
    optimizer = torch.optim.SGD(modules.parameters(), lr=0.01)
    for _ in range(steps):
        x = F.relu(body(torch.randn(20, 16)))
        labels = torch.randint(0, 4, (20,))
        kept = torch.where(labels > 0)[0]
        box = boxes(x).reshape(20, 4, 4)[kept, labels[kept]]
        loss = F.cross_entropy(classes(x), labels)
        loss = loss + F.smooth_l1_loss(box, torch.randn(len(kept), 4), beta=1 / 9, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


PROGRAMS = (
    variational_autoencoder,
    gan,
    least_squares_gan_with_noisy_labels,
    digits_classifier,
    classifier_under_autocast,
    classifier_with_accumulation,
    regression,
    bounded_regression,
    siamese_network,
    word_language_model,
    transformer_language_model,
    policy_gradient,
    distillation,
    mixup,
    segmentation,
    binary_segmentation,
    triplet,
    contrastive,
    ctc_reader,
    counts_and_variances,
    detector_losses,
)
