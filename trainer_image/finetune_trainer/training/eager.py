"""torch without its compiler: nothing here compiles, and importing torch._dynamo takes longer than importing torch."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"
INDEXING = f"{COMPILER}._trace_wrapped_higher_order_op"  # transformers' masks take one name from it


@contextmanager
def no_compiler() -> Iterator[None]:
    """Within it `torch.compile` and the marks for it (disable, graph_break, ...) are without effect.

    Libraries mark their functions while they are imported, optimizers while they are made and whenever they step; each
    time torch would import its whole compiler: sympy, networkx, torch.distributed.tensor, half of the start-up. The
    first use of anything but a mark imports it after all, and then this changes nothing any more. Eager functions also
    give the same bits on every node, and need no C++ compiler in the image.
    """
    if COMPILER in sys.modules and not isinstance(sys.modules[COMPILER], Unloaded):
        yield
        return
    compiler = torch.compile
    torch.compile = _mark  # type: ignore[assignment]
    sys.modules[COMPILER] = Unloaded(COMPILER, MARKS)
    sys.modules[INDEXING] = Unloaded(INDEXING, {"TransformGetItemToIndex": _indexing})
    try:
        yield
    finally:
        torch.compile = compiler
        _make_way()


class Unloaded(ModuleType):
    """Stands in a module's place until something is used that is not in `known`."""

    def __init__(self, name: str, known: dict[str, Callable[..., Any]]) -> None:
        super().__init__(name)
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        is_package = self.__name__ == COMPILER
        if name.startswith("__") and not (is_package and name == "__path__"):
            raise AttributeError(name)  # asked by the import system of every module
        _make_way()
        return getattr(import_module(self.__name__), name)


def _make_way() -> None:
    for name in (COMPILER, INDEXING):
        if isinstance(sys.modules.get(name), Unloaded):
            del sys.modules[name]


def _mark(function: Callable[..., Any] | None = None, *_: object, **options: object) -> Callable[..., Any]:
    return function if function is not None else lambda decorated: decorated


def _indexing() -> AbstractContextManager[object]:
    made: AbstractContextManager[object] = import_module(INDEXING).TransformGetItemToIndex()
    return made


MARKS: dict[str, Callable[..., Any]] = {
    "disable": _mark,
    "allow_in_graph": _mark,
    "assume_constant_result": _mark,
    "graph_break": lambda *_, **__: None,
}
