"""Trees of tensors: what PyTorch's pytrees make of them, by a way of our own for lists and tuples."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch.utils._pytree import tree_flatten

from memformer_kernels.replay.tree import Tree

Pair = namedtuple("Pair", "left right")


def tensor(i=0):
    return torch.full((2,), float(i))


TREES = {
    "tensor": lambda: tensor(),
    "parameter": lambda: torch.nn.Parameter(tensor()),
    "nothing": lambda: None,
    "number": lambda: 3,
    "no segments": lambda: ([], tensor()),
    "segments": lambda: ([(tensor(1), tensor(2)), (tensor(3), tensor(4))], tensor(5)),
    "lists": lambda: [[tensor(1)], [], [tensor(2), [tensor(3)]]],
    "options": lambda: ([(tensor(1), None), (tensor(2), "whole", True)], {"b": tensor(3), "a": [tensor(4)]}),
    "named": lambda: [Pair(tensor(1), (tensor(2), Pair(3, tensor(4))))],
    "ordered": lambda: (OrderedDict(b=tensor(1), a=tensor(2)), [tensor(3)]),
}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
def test_leaves_are_those_of_pytorch_in_its_order(make):
    tree = make()
    assert list(map(id, Tree.of(tree).leaves)) == list(map(id, tree_flatten(tree)[0]))


@pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
def test_a_tree_is_put_together_again(make):
    tree = make()
    again = Tree.of(tree).whole()
    (leaves, spec), (leaves_again, spec_again) = tree_flatten(tree), tree_flatten(again)
    assert spec == spec_again and type(again) is type(tree)
    assert list(map(id, leaves)) == list(map(id, leaves_again))


def test_trees_are_of_one_form_where_pytorch_says_so():
    for name, make in TREES.items():
        for other_name, other in TREES.items():
            alike = tree_flatten(make())[1] == tree_flatten(other())[1]
            assert (Tree.of(make()).spec == Tree.of(other()).spec) == alike, (name, other_name)
