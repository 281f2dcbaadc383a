"""The host's half of the files of `language/`, `collectives/`, `nvls/` and `hierarchical/`, without Triton.

These files hold kernels, and beside them the layout of the heap and the tables of algorithms, which is all that a call
needs once its kernel is compiled. Importing them imports Triton, a compiler. So the host reads them a second time, as
modules of its own in which a kernel is its Python function and a constexpr its value; whoever compiles a kernel asks
`kernel_of` for the one that Triton made.
"""

import builtins
import importlib
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tdccl.environment import emulated

_PACKAGE = Path(__file__).parent.parent
_READ = ("tdccl.language", "tdccl.collectives", "tdccl.nvls", "tdccl.hierarchical")
_modules: dict[str, ModuleType] = {}


class BareKernel:
    """What `@triton.jit` makes here: as much of a Triton function as the host looks at."""

    def __init__(self, function):
        self.fn = function
        self.arg_names = list(inspect.signature(function).parameters)


class _Constexpr:
    def __init__(self, value):
        self.value = value


class _Anything:
    """Whatever else a file takes from Triton: it is passed on, never used."""

    def __getattr__(self, name):
        return self

    def __call__(self, function):  # as a decorator
        return function


_triton = _Anything()
_triton.language = _Anything()
_triton.language.constexpr = _Constexpr
_triton.jit = BareKernel
_triton.constexpr_function = lambda function: function


def read(name: str) -> ModuleType:
    """A module of one of these packages without Triton; in emulation, which needs Triton, itself."""
    if emulated():
        return importlib.import_module(name)
    module = _modules.get(name)
    if module is None:
        path = _PACKAGE.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        spec = importlib.util.spec_from_file_location(name, path)
        module = _modules[name] = importlib.util.module_from_spec(spec)
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
        spec.loader.exec_module(module)
    return module


def _import(name, namespace=None, local=None, wanted=(), level=0):
    """What `import` does in such a module."""
    if name.partition(".")[0] == "triton":
        return _triton.language if wanted and name.startswith("triton.language") else _triton
    if not name.startswith(_READ):
        return builtins.__import__(name, namespace, local, wanted, level)
    module = read(name)
    if not wanted:  # import tdccl.language as shmem: Python asks for the first, and goes on from there by name
        for part in reversed(name.split(".")[1:]):
            module = SimpleNamespace(**{part: module})
        return module
    for part in wanted:
        if not hasattr(module, part):
            setattr(module, part, read(f"{name}.{part}"))
    return module


def kernel_of(kernel):
    """The kernel that Triton made, of one from a table that was read without it."""
    if isinstance(kernel, BareKernel):
        return getattr(importlib.import_module(kernel.fn.__module__), kernel.fn.__name__)
    return kernel
