"""Make a module that holds what another one holds, but is of another class."""

from types import MethodType
from typing import Any

from torch import nn


def become(kind: Any, module: nn.Module) -> Any:
    """An object of class `kind` with all that `module` has: parameters, hooks, whatever else.

    The tensors are the same objects; `module` stays as it is.
    """
    new: nn.Module = object.__new__(kind)
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            value = MethodType(value.__func__, new)
        vars(new)[name] = value
    for held in ("_parameters", "_buffers", "_modules"):
        vars(new)[held] = dict(vars(module)[held])
    return new
