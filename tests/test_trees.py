"""One function reads every nested value: a container comes back as it was, with other leaves."""

import dataclasses
import gc
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from dlhelpers import trees


@dataclasses.dataclass
class Plain:
    logits: Tensor
    size: int = 3
    more: Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        self.more = self.logits + 1


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    logits: Tensor
    name: str = "frozen"


@dataclasses.dataclass
class ModelOutput(OrderedDict):
    """As Hugging Face's: a dataclass that is a mapping of those fields that are not None."""

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self):
        return type(self), tuple(getattr(self, f.name) for f in dataclasses.fields(self))


class Names(list):
    pass


Pair = namedtuple("Pair", "first second")
ONE, TWO = torch.ones(2), torch.full((2,), 2.0)

CONTAINERS = {
    "tuple": (ONE, TWO),
    "list subclass": Names([ONE, TWO]),
    "named tuple": Pair(ONE, TWO),
    "deque": deque([ONE, TWO], maxlen=4),
    "dict": {"b": ONE, "a": TWO},
    "ordered dict": OrderedDict(b=ONE, a=TWO),
    "default dict": defaultdict(list, a=ONE, b=TWO),
    "user dict": UserDict(a=ONE, b=TWO),
    "dataclass": Plain(ONE),
    "frozen dataclass with slots": (Frozen(ONE), Frozen(TWO)),
    "Hugging Face's output": ModelOutput(logits=ONE),
    "namespace": SimpleNamespace(a=ONE, b=(TWO, None)),
    "nested": [{"a": (Plain(ONE), [Pair(TWO, 3)])}, None, "text"],
    "torch's own": torch.max(torch.rand(3, 4), dim=1),
    "packed": pack_sequence([torch.rand(3), torch.rand(2)]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_rebuilt_with_other_leaves(name):
    value = CONTAINERS[name]
    leaves, rebuild = trees.flatten(value)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    assert found
    assert [id(t) for t in trees.tensors_in(value)] == [id(t) for t in found]
    made = rebuild(-leaf if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    assert type(made) is type(value)
    for old, new in zip(trees.tensors_in(value), trees.tensors_in(made), strict=True):
        assert torch.equal(new, -old)
    again, _ = trees.flatten(made)
    assert [type(leaf) for leaf in again] == [type(leaf) for leaf in leaves]
    assert [id(t) for t in trees.tensors_in(value)] == [id(t) for t in found]  # as it was


def test_what_belongs_to_a_container_beside_its_entries_is_kept():
    kept = trees.map_leaves(lambda leaf: leaf, CONTAINERS["default dict"])
    assert kept.default_factory is list
    assert trees.map_leaves(lambda leaf: leaf, CONTAINERS["deque"]).maxlen == 4
    output = trees.map_leaves(torch.neg, CONTAINERS["Hugging Face's output"])
    assert output.logits is output["logits"]
    assert output.loss is None
    assert list(output) == ["logits"]
    packed = trees.map_leaves(lambda t: t if t is None else t + 1, CONTAINERS["packed"])
    assert isinstance(packed, PackedSequence)
    assert list(trees.map_leaves(lambda leaf: leaf, {"b": 1, "a": 2})) == ["b", "a"]


def test_what_cannot_be_written_to_becomes_a_dict():
    made = trees.map_leaves(torch.neg, MappingProxyType({"a": ONE}))
    assert made.keys() == {"a"}
    assert torch.equal(made["a"], -ONE)


def test_modules_texts_and_numbers_are_leaves():
    for leaf in (nn.ModuleDict({"a": nn.Linear(1, 1)}), "text", b"bytes", 3, None, Plain, object()):
        assert trees.entries(leaf) is None
        assert trees.flatten(leaf)[0] == [leaf]
    with pytest.raises(TypeError, match="a str holds no entries"):
        trees.rebuilt("text", [])


def test_a_class_registered_with_pytree_is_opened():
    class Registered:
        def __init__(self, tensor):
            self.tensor = tensor

    torch.utils._pytree.register_pytree_node(
        Registered, lambda one: ([one.tensor], None), lambda inner, _: Registered(*inner)
    )
    assert torch.equal(trees.map_leaves(torch.neg, Registered(ONE)).tensor, -ONE)


@pytest.mark.parametrize("make", [Plain, Frozen, lambda t: ModelOutput(t), lambda t: {"a": [t]}])
def test_the_structure_holds_no_tensor(make):
    tensor = torch.rand(3)
    gone = weakref.ref(tensor)
    value = make(tensor)
    rebuild = trees.flatten(value)[1]
    del value, tensor
    gc.collect()
    assert gone() is None
    assert rebuild is not None


def test_a_record_of_which_there_is_one_stays_as_it_is():
    @dataclasses.dataclass(frozen=True)
    class Only:
        tensor: Tensor

        def __copy__(self):
            return self

    only = Only(ONE)
    assert torch.equal(trees.map_leaves(torch.neg, only).tensor, -ONE)
    assert only.tensor is ONE
