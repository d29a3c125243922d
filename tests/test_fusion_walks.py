"""A forward that torch.fx cannot follow, and that reaches its layers by other ways than a call."""

import functools
import itertools
import re
import types
from collections import OrderedDict

import pytest
import torch
from test_fusion import conv, image, lived, norm
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dlhelpers.fusion import fold_after, fuse_conv_bn


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def body():
    return nn.Sequential(OrderedDict(conv_1=conv(), norm_1=norm(), relu_1=nn.ReLU()))


class Odd(nn.Module):
    """A collection of its own kind, with methods besides its forward."""

    def __init__(self):
        super().__init__()
        self.inner = body()

    def __iter__(self):
        return iter(self.inner)

    def features(self, x):
        return self.inner.conv_1(x)

    def forward(self, x):
        return self.inner(x)


class Walker(nn.Module):
    """Calls its children as a whole on one branch, and goes another way on the other one."""

    def __init__(self):
        super().__init__()
        self.body, self.other, self.odd = body(), body(), Odd()
        self.layers = nn.ModuleList([body(), body()])
        self.key, self.keys, self.table = "body", ["conv_1"], {"a": self.body}

    def first(self, layers):
        return layers[0]

    @property
    def stem(self):
        return self.body.conv_1

    def forward(self, x):
        if float(x.sum()) < 0:
            return self.way(x)
        y = self.other(x) + self.odd(x)
        for layer in self.layers:
            y = y + layer(x)
        return self.body(y)


def walker(way):
    """Return one whose other branch is a method of its class."""
    return type(way.__name__, (Walker,), {"way": way})()


def helper(layers, x):
    return layers[0](x)


def of_a_model(model, x):
    return model.body.conv_1(x)


def by_named_children(self, x):
    for _, layer in self.body.named_children():
        return layer(x)


def by_getattr(self, x):
    return getattr(getattr(self, self.key), self.keys[0])(x)


def by_get_submodule(self, x):
    return self.get_submodule("body.conv_1")(x)


def by_a_helper(self, x):
    return helper(self.body, x)


def by_a_helper_of_the_model(self, x):
    return of_a_model(self, x)


def by_a_slice(self, x):
    for layer in self.body[:1]:
        x = layer(x)
    return x


def by_a_slice_called(self, x):
    return self.body[:1](x)


def by_an_index(self, x):
    first = 0
    return self.body[first](x)


def by_another_name(self, x):
    layers = self.body
    first = layers.conv_1
    return first(x)


def by_a_table(self, x):
    return self.table["a"].conv_1(x)


def by_unpacking(self, x):
    first, *_ = self.body
    return first(x)


def by_a_comprehension(self, x):
    return sum(next(layers.children())(x) for layers in self.layers)


def by_modules(self, x):
    return list(filter(lambda m: isinstance(m, nn.Conv2d), self.modules()))[0](x)  # noqa: RUF015


def by_the_registry(self, x):
    return self._modules["body"]._modules["conv_1"](x)


def by_a_dunder(self, x):
    return self.body.__getitem__(0)(x)


def by_a_lambda(self, x):
    return (lambda layers: layers[0](x))(self.body)


def by_islice(self, x):
    for layer in itertools.islice(self.body, 1):
        x = layer(x)
    return x


def by_enumerate(self, x):
    for _, layers in enumerate(self.layers):
        for number, layer in enumerate(layers):
            if number == 0:
                x = layer(x)
    return x


def by_pairs_of_pairs(self, x):
    for _, (first, second) in enumerate(zip(self.body, self.other, strict=True)):
        return first(x) + second(x)


def by_pairs_unpacked_later(self, x):
    for pair in self.body.named_children():
        _, layer = pair
        return layer(x)


def by_an_index_of_pairs(self, x):
    for pair in list(zip(self.body, "abc", strict=True)):
        return pair[0](x)


def by_a_list_of_tuples(self, x):
    pairs = [(self.other, self.body)]
    return pairs[0][1][0](x)


def by_a_dictionary(self, x):
    return {"a": (0, self.body)}.get("a")[1][0](x)


def by_a_walrus_in_a_loop(self, x):
    layers = [self.body]
    while layers and (layer := layers.pop()):
        return layer[0](x)


def by_names(self, x):
    for name, _ in self.body.named_children():
        return getattr(self.body, name)(x)


def by_a_sum_of_lists(self, x):
    return (list(self.body) + list(self.other))[0](x)


def by_a_method(self, x):
    return self.first(self.body)(x)


def by_a_property(self, x):
    return self.stem(x)


def by_its_weights(self, x):
    return F.conv2d(x, self.body.conv_1.weight, self.body.conv_1.bias, padding=1)


def by_its_statistics(self, x):
    second = self.body[1]
    return x * second.running_var.view(1, -1, 1, 1)


def by_an_expression(self, x):
    return (self.body if float(x.sum()) > 0 else self.body.conv_1)(x)


def by_assignment(self, x):
    return (layers := self.body)[0](x) if self.key else layers


def by_checkpoint(self, x):
    return checkpoint(self.body[0], x, use_reentrant=False)


def by_partial(self, x):
    return functools.partial(self.body[0])(x)


def by_a_nested_function(self, x):
    def run(layers):
        return layers[0](x)

    return run(self.body)


def by_forward(self, x):
    return self.body[0].forward(x)


def by_reduce(self, x):
    return functools.reduce(lambda y, layer: layer(y), list(self.body)[:1], x)


def by_a_queue(self, x):
    left = list(self.body)
    while left:
        return left.pop(0)(x)


def by_apply(self, x):
    found = []
    self.body.apply(lambda m: found.append(m(x)) if isinstance(m, nn.Conv2d) else None)
    return found[0]


def by_an_attribute(self, x):
    self.current = self.body
    return self.current[0](x)


def by_its_own_iteration(self, x):
    for layer in self.odd:
        return layer(x)


def by_another_method(self, x):
    return self.odd.features(x)


WAYS = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("way", WAYS)
def test_no_layer_is_folded_whose_use_was_not_seen_on_every_path(way):
    model, x = lived(walker(way)).eval(), image(4).abs()
    fused, report = fuse_conv_bn(model, verify=False)
    with torch.no_grad():
        for given in (x, -x):
            assert torch.allclose(model(given), fused(given), atol=1e-5), report
    assert report.folded < report.found == 5
    assert all(report.left.values())


class Whole(Walker):
    """Calls its children as wholes alone, however it gets there."""

    def __init__(self):
        super().__init__()
        self.flag, self.missing = False, None

    def forward(self, x):
        if float(x.sum()) < 0:
            x = -x
        if self.flag:
            return self.body[0](x)
        if self.missing is not None:
            return helper(self.body, x)
        for number, layer in enumerate(self.layers[:2]):
            x = layer(x) * number
        for way in (self.body, self.other):
            x = way(x)
        if self.training:
            x = self.body[0](x)
        return getattr(self, "odd")(x)  # noqa: B009


def test_a_child_that_is_called_as_a_whole_is_folded_inside():
    model, x = lived(Whole()).eval(), image(4)
    fused, report = fuse_conv_bn(model, x)
    assert (report.folded, report.found) == (5, 5), report
    with torch.no_grad():
        assert torch.allclose(model(x), fused(x), atol=1e-5)


class Turns(Walker):
    """Sets what its branch depends on."""

    def __init__(self):
        super().__init__()
        self.flag = False

    def forward(self, x):
        if self.flag:
            return self.body[0](x)
        if float(x.sum()) < 0:
            self.flag = True
        return self.body(x)


def test_a_setting_that_a_forward_changes_is_none():
    _, report = fuse_conv_bn(lived(Turns()), verify=False)
    assert report.left["body.norm_1"] == "Turns calls it, and cannot be traced"


def test_a_forward_without_source_and_one_of_an_instance_forbid_all_that_they_may_reach():
    space = {"Walker": Walker}
    exec(
        "class NoSource(Walker):\n"
        "    def forward(self, x):\n"
        "        return self.body[0](x) if float(x.sum()) < 0 else self.body(x)\n",
        space,
    )
    model = lived(space["NoSource"]())
    assert fuse_conv_bn(model, verify=False)[1].folded == 0
    patched = lived(walker(by_an_index))
    patched.forward = types.MethodType(by_an_index, patched)
    fused, report = fuse_conv_bn(patched, image(4))
    assert report.folded < report.found
    x = image(4)
    assert torch.allclose(fused(x), patched.eval()(x), atol=1e-5)
    # an attribute that is a method under another name is no matter
    bound = lived(nn.Sequential(conv(), norm()))
    bound.way = types.MethodType(by_an_index, bound)
    assert fuse_conv_bn(bound, x)[1].folded == 1


# ---- methods that fold a module by themselves ----


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(self, x):
        return self.norm(self.conv(x))


class Deploys(nn.Module):
    """RepVGG's block as its own repository has it: three branches, and their sum in their place."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(conv(), norm())
        self.narrow, self.same = nn.Sequential(nn.Conv2d(4, 4, 1), norm()), norm()

    def forward(self, x):
        if hasattr(self, "deployed"):
            return F.relu(self.deployed(x))
        return F.relu(self.wide(x) + self.narrow(x) + self.same(x))

    def switch_to_deploy(self):
        one = nn.Conv2d(4, 4, 1, bias=False)
        nn.init.dirac_(one.weight)
        wide, narrow = fold_after(*self.wide), fold_after(*self.narrow)
        same = fold_after(one, self.same)
        self.deployed = conv()
        pads = (F.pad(layer.weight, [1] * 4) for layer in (narrow, same))
        self.deployed.weight.data = wide.weight + sum(pads)
        self.deployed.bias.data = wide.bias + narrow.bias + same.bias
        del self.wide, self.narrow, self.same


class Returns(Plain):
    """As timm's: another module stands in its place."""

    def fuse(self):
        return fold_after(self.conv, self.norm)


class Replaces(Plain):
    """As YOLO's: with an argument that may be left out, and another forward."""

    def fuse(self, verbose=False):
        self.conv = fold_after(self.conv, self.norm)
        del self.norm
        self.forward = self.conv.forward
        return self


@pytest.mark.parametrize(
    ("kind", "method", "count"), [(Deploys, "switch_to_deploy", 3), *[(Returns, "fuse", 1)]]
)
def test_a_known_reparametrization_is_used(kind, method, count):
    model, x = lived(nn.Sequential(kind(), nn.ReLU())), image(4)
    state = torch.get_rng_state()
    fused, report = fuse_conv_bn(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row.into for row in report.rows] == [f"0.{method}()"] * count
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), fused(x), atol=1e-5)
    assert fuse_conv_bn(fused, x)[1].found == 0


def test_a_method_with_an_optional_argument_is_used_as_well():
    model, x = lived(nn.Sequential(Replaces())), image(4)
    fused, report = fuse_conv_bn(model, x)
    assert report.rows[0].into == "0.fuse()"
    assert torch.allclose(model.eval()(x), fused(x), atol=1e-5)


class Mixes(Plain):
    def fuse(self, *features):
        return torch.cat(features, 1)


class Needs(Plain):
    def fuse(self, *, how):
        raise NotImplementedError


class Static(Plain):
    @staticmethod
    def fuse(value=None):
        return value


class Property(Plain):
    @property
    def fuse(self):
        raise RuntimeError


class Text(Plain):
    fuse = "sum"


class Held(Plain):
    def __init__(self, held):
        super().__init__()
        self.fuse = held

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    "make",
    [
        *(Mixes, Needs, Static, Property, Text),
        lambda: Held(nn.Conv2d(4, 4, 1)),
        lambda: Held(nn.Parameter(torch.ones(1))),
        lambda: Held(torch.sigmoid),
        lambda: Held(lambda a, b: a + b),
    ],
)
def test_what_else_is_named_fuse_is_left_alone(make):
    model = lived(nn.Sequential(make()))
    _, report = fuse_conv_bn(model, image(4))
    assert (report.rows[0].into, report.notes) == ("0.conv", ())


class InSingle(Plain):
    """Does not run in float64, by a call of its own."""

    def __init__(self, error, raises=RuntimeError):
        super().__init__()
        self.error, self.raises = error, raises

    def forward(self, x):
        if x.dtype == torch.float64:
            raise self.raises("no kernel for double")
        return super().forward(x)

    def fuse(self):
        self.conv, self.norm = fold_after(self.conv, self.norm), nn.Identity()
        self.conv.weight.data *= 1 + self.error


@pytest.mark.parametrize("raises", [RuntimeError, AssertionError, KeyError])
def test_without_float64_the_bound_is_what_one_last_place_does(raises):
    _, report = fuse_conv_bn(lived(InSingle(0.0, raises)), image(4))
    assert report.rows[0].into == "fuse()"
    assert re.search("no kernel for double.*Allowed are outputs that differ by", report.notes[0])
    # a thousandth is a mistake here, though it is far below a percent
    _, report = fuse_conv_bn(lived(InSingle(1e-3, raises)), image(4))
    assert report.rows[0].into == "conv"
    assert "fuse(): not used, since with it the fused model's outputs differ" in report.notes[-1]


class Counts(nn.Module):
    """A forward that writes to buffers, as an observer or a moving average does."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), norm()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x):
        self.calls.add_(1)
        self.table.mul_(2)
        return self.norm(self.conv(x))


def test_buffers_that_a_forward_writes_to_are_as_they_were():
    model = lived(Counts()).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    folded, report = fuse_conv_bn(model, image(4))
    assert report.folded == 1
    for made in (model, folded):
        for name in ("calls", "table"):
            assert torch.equal(getattr(made, name), before[name])
