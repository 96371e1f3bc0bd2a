"""Make a module of another class that has the contents of a given one."""

from types import MethodType
from typing import Any

from torch import nn


def become(kind: Any, module: nn.Module) -> Any:
    """Return an object of class `kind` with all that `module` has: parameters, hooks and the rest.

    The tensors are the same objects, and `module` is not changed.
    """
    new: nn.Module = object.__new__(kind)
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            value = MethodType(value.__func__, new)
        vars(new)[name] = value
    for held in ("_parameters", "_buffers", "_modules"):
        vars(new)[held] = dict(vars(module)[held])
    return new
