"""One function reads every nested value: a container comes back as it was, with other leaves."""

import dataclasses
import gc
import weakref
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from dlhelpers import trees
from dlhelpers.memory import estimate
from dlhelpers.models import copied
from dlhelpers.quantization.batches import named_leaves
from dlhelpers.reached import objects_in


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
    "chain": ChainMap({"a": ONE}, {"b": TWO}),
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


class Tensors(dict):
    """Takes tensors alone."""

    def __setitem__(self, key, value):
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} must be a tensor")
        super().__setitem__(key, value)


class Kept(Mapping):
    """Holds its entries in a dict of its own, and says what is read through it."""

    def __init__(self, **entries):
        self._entries, self.name = entries, "kept"

    def __getitem__(self, key):
        raise AssertionError("the values need not be computed")

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)


class Lazy(Mapping):
    """As a file of HDF5: reads a value when it is asked for."""

    def __init__(self, count):
        self.count, self.reads = count, 0

    def __getitem__(self, key):
        self.reads += 1
        return torch.zeros(2)

    def __iter__(self):
        return iter(range(self.count))

    def __len__(self):
        return self.count


class Strict(list):
    def extend(self, values):
        for value in values:
            if not isinstance(value, Tensor):
                raise ValueError("tensors alone")
        super().extend(values)


class Positive(namedtuple("Positive", "first second")):
    @classmethod
    def _make(cls, values):
        first, second = values
        if not isinstance(first, Tensor):
            raise ValueError("tensors alone")
        return cls(first, second)


def _node(kind):
    """Return a container that holds a tensor, itself, and the tensor once more."""
    if kind == "list":
        value = [ONE]
        value.append(value)
        value.append(ONE)
    elif kind == "dict":
        value = {"first": ONE}
        value["inner"] = {"up": [value]}
        value["last"] = ONE
    elif kind == "namespace":
        value = SimpleNamespace(first=ONE)
        value.me = value
        value.last = ONE
    elif kind == "dataclass":
        value = Plain(ONE)
        value.size = value
        value.more = ONE
    elif kind == "user dict":
        value = UserDict(first=ONE)
        value["me"] = (value,)
        value["last"] = ONE
    else:
        value = deque([ONE])
        value.append({"up": value})
        value.append(ONE)
    return value


CYCLES = ["list", "dict", "namespace", "dataclass", "user dict", "deque"]


@pytest.mark.parametrize("kind", CYCLES)
def test_a_container_inside_itself_is_a_leaf(kind):
    value = _node(kind)
    assert [t is ONE for t in trees.tensors_in(value)] == [True, True]
    leaves, rebuild = trees.flatten(value)
    assert [leaf is value for leaf in leaves] == [False, True, False]
    made = rebuild(leaves)
    assert type(made) is type(value)
    assert made is not value
    mapped = trees.map_leaves(lambda leaf: TWO if leaf is ONE else leaf, value)
    found = list(trees.tensors_in(mapped))
    assert (found[0] is TWO, found[-1] is TWO) == (True, True)
    assert len(named_leaves((value,))) == 3


def test_what_stands_twice_side_by_side_is_given_twice_and_once_where_once_is_enough():
    pair = [ONE]
    assert len(list(trees.tensors_in((pair, {"again": pair})))) == 2
    assert len(list(trees.tensors_in((pair, {"again": pair}), once=True))) == 1
    assert trees.flatten((pair, pair))[0] == [ONE, ONE]


def test_nodes_that_all_know_each_other_are_read_once():
    nodes = [SimpleNamespace(weight=torch.rand(1)) for _ in range(30)]
    for node in nodes:
        node.others = nodes  # on as many ways as 30 nodes can be put in a row
        node.next = [other for other in nodes if other is not node]
    found = list(trees.tensors_in(nodes[0], once=True))
    assert {id(t) for t in found} == {id(node.weight) for node in nodes}


@pytest.mark.parametrize("kind", CYCLES)
def test_a_model_may_hold_what_holds_itself(kind):
    model = nn.Sequential(nn.Linear(4, 3))
    model.tree, model.graph = _node(kind), (torch.ones(2, requires_grad=True) * 2)
    made = copied(model)
    assert torch.equal(made[0].weight, model[0].weight)
    assert made.tree is not model.tree
    assert torch.equal(made.graph, model.graph)


def test_a_mapping_that_makes_its_values_is_a_leaf_and_not_read():
    model = nn.Sequential(nn.Linear(4, 3))
    model.words = lazy = Lazy(20)
    assert trees.flatten({"a": lazy})[0] == [lazy]
    assert list(trees.tensors_in([lazy])) == []
    assert isinstance(copied(model).words, Lazy)
    assert any(one is lazy for one in objects_in([model]))
    estimate(model, torch.rand(2, 4), torch.optim.SGD)
    assert lazy.reads == 0


def test_a_mapping_with_a_dict_of_its_own_is_opened_there():
    value = Kept(a=ONE, b=[TWO])
    made = trees.map_leaves(torch.neg, value)
    assert type(made) is Kept
    assert made.name == "kept"
    assert torch.equal(made._entries["b"][0], -TWO)
    assert value._entries == {"a": ONE, "b": [TWO]}


def test_a_container_that_checks_its_entries_keeps_its_class_or_becomes_a_plain_one():
    named = Tensors()
    named["a"] = ONE
    made = trees.map_leaves(torch.neg, named)
    assert type(made) is Tensors
    assert torch.equal(made["a"], -ONE)
    assert trees.map_leaves(str, named) == {"a": str(ONE)}
    assert torch.equal(trees.map_leaves(torch.neg, Strict([ONE]))[0], -ONE)
    assert trees.map_leaves(str, Strict([ONE])) == [str(ONE)]
    assert trees.map_leaves(str, Positive(ONE, TWO)) == (str(ONE), str(TWO))
    assert list(named) == ["a"]
    assert named["a"] is ONE


def test_a_mapping_whose_copy_is_itself_is_not_written_to():
    class Single(dict):
        def __copy__(self):
            return self

    value = Single(a=ONE)
    assert torch.equal(trees.map_leaves(torch.neg, value)["a"], -ONE)
    assert value["a"] is ONE
