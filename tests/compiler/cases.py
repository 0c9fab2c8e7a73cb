"""A graph as somebody wrote it, and what ``mmfast.compiler`` makes of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Case:
    function: Callable
    shapes: dict
    takes: tuple = ()
    leaves: tuple = ()


CASES: dict[str, Case] = {}


def case(shapes, *takes, leaves=()):
    """Registers a graph; a shape that holds "bool" or "int" makes such a tensor."""

    def register(function):
        CASES[function.__name__] = Case(function, shapes, takes, leaves)
        return function

    return register


def together(*tensors):
    return torch.stack([t.sum() for t in tensors])
