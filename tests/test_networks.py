"""The networks of the lesson on quantization: what they compute, and how their channels differ."""

import torch
from torch import nn

from dlhelpers.course import networks, training
from dlhelpers.quantization import choose_affine, dequantize, quantize


def test_uneven_channels_are_a_hundred_times_further_apart_and_compute_the_same():
    torch.manual_seed(0)
    layers = [*networks.convolution(1, 16), *networks.separable(16, 32, stride=2)]
    model = nn.Sequential(*layers)
    x = torch.rand(8, 1, 8, 8)
    for _ in range(20):
        model(x)
    model.eval()
    other = networks.with_uneven_channels(model)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)
    assert networks.spread(other) > 30 * networks.spread(model)
    assert other[3].weight is not model[3].weight


def test_a_seed_gives_the_weights_and_the_batches_and_the_random_state_stays(monkeypatch):
    seeds = []
    monkeypatch.setattr(training, "fit", lambda *args, seed, **options: seeds.append(seed))
    state = torch.get_rng_state()
    one, same, other = (networks.on_digits(networks.separable, seed) for seed in (1, 1, 2))
    assert seeds == [1, 1, 2]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert not one.training
    assert one(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_torchs_tensor_means_the_same_numbers():
    values = torch.randn(3, 4)
    grid = choose_affine(values, signed=False)
    q = quantize(values, grid)
    torch.testing.assert_close(
        networks.torch_quantized(q, grid).dequantize(), dequantize(q, grid), rtol=1e-6, atol=1e-6
    )


def test_photographs_are_in_the_range_and_the_batch_norms_have_seen_them():
    model, photos = networks.resnet18_and_photos()
    assert photos.shape == (16, 3, 96, 96)
    assert 0 <= photos.min() < photos.max() <= 1
    assert {
        m.num_batches_tracked.item() for m in model.modules() if hasattr(m, "running_mean")
    } == {2}
