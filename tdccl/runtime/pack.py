"""Packs: kernels compiled ahead of time, so that a process that finds one need not compile them.

A pack is a zip file, read without Triton: `index.json` says what it was built from, `<arch>/index.json` describes the
kernels of one architecture by key, and `<arch>/<key>.cubin` is a kernel's machine code, read when it is asked for. The
key is a digest of all that goes into the machine code; see `launch.identity`.
"""

import functools
import hashlib
import json
import logging
import os
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from tdccl import __version__, environment

_log = logging.getLogger(__name__)
_DEFAULT_SHARED = 48 << 10  # more than this a kernel must ask for
_MOMENT = (1980, 1, 1, 0, 0, 0)  # of every file in a pack: the same kernels make the same bytes
UNREADABLE = (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error)


class Kernel(NamedTuple):
    """What a pack says of a kernel.

    name     in its module
    shared   bytes of shared memory of a block
    threads  of a block
    source   file and function, as "all_reduce.one_shot_ll"; with `ranks`, `dtype` and `op` for people to read
    """

    name: str
    shared: int
    threads: int
    source: str
    ranks: int
    dtype: str
    op: str | None


class Loaded(NamedTuple):
    """A kernel on the current device: its handle, bytes of shared memory, what must live as long as it, and the handle
    of its module."""

    function: int
    shared: int
    owner: Any
    module: Any


def key_of(identity: str) -> str:
    """The name in a pack of a kernel of this identity."""
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def source_digest() -> str:
    """A digest of the sources of all kernels and of how they are compiled: a pack made from others is stale."""
    package = Path(__file__).parent.parent
    kernels = (
        file
        for folder in ("language", "collectives", "nvls", "hierarchical")
        for file in package.glob(f"{folder}/*.py")
    )
    files = [*kernels, package / "runtime" / "launch.py"]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


class Pack:
    """A pack that lies in a file. Making and reading one raises one of `UNREADABLE` if the file is damaged."""

    def __init__(self, path: str):
        self.path = path
        self._file = zipfile.ZipFile(path)
        self.header = json.loads(self._file.read("index.json"))
        self.archs: list[str] = self.header["archs"]
        self.sources: str = self.header["sources"]  # a digest
        self._indices: dict[str, dict[str, dict] | None] = dict.fromkeys(self.archs)  # read when asked for

    def keys(self, arch: str) -> list[str]:
        """Those of all kernels for `arch`."""
        return list(self._index(arch))

    def kernel(self, arch: str, key: str) -> Kernel | None:
        """What the pack says of a kernel, None if it has none of this key for `arch`."""
        fields = self._index(arch).get(key)
        return fields and Kernel(**fields)

    def cubin(self, arch: str, key: str) -> bytes:
        """The machine code of a kernel that it has."""
        return self._file.read(f"{arch}/{key}.cubin")

    def _index(self, arch: str) -> dict[str, dict]:
        index = self._indices.get(arch, {})
        if index is None:
            index = self._indices[arch] = json.loads(self._file.read(f"{arch}/index.json"))
        return index


def write(path: str, sources: str, triton: str, kernels: dict[str, dict[str, tuple[Kernel, bytes]]]) -> None:
    """Writes a pack of {arch: {key: (kernel, cubin)}}, at once or not at all: a reader never sees half of one.

    sources, triton: digest of the sources that were compiled, and the version of what compiled them.
    """
    header = {"tdccl": __version__, "sources": sources, "triton": triton, "archs": sorted(kernels)}
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            _add(archive, "index.json", json.dumps(header))
            for arch, entries in sorted(kernels.items()):
                index = {key: kernel._asdict() for key, (kernel, _) in sorted(entries.items())}
                _add(archive, f"{arch}/index.json", json.dumps(index))
                for key, (_, cubin) in sorted(entries.items()):
                    _add(archive, f"{arch}/{key}.cubin", cubin)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _add(archive: zipfile.ZipFile, name: str, content: str | bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _MOMENT), content, zipfile.ZIP_DEFLATED)


@functools.cache
def _found() -> list[Pack]:
    """The packs of this process; one that cannot be used is left out, with a warning."""
    packs = []
    for path in environment.packs():
        try:
            pack = Pack(path)
        except UNREADABLE as error:
            warnings.warn(f"tdccl: the pack {path} is ignored: {error!r}", stacklevel=2)
            continue
        if pack.sources == source_digest():
            packs.append(pack)
        else:
            warnings.warn(
                f"tdccl: the pack {path} is ignored: it was built from other kernel sources than these of tdccl "
                f"{__version__}; build it again with python -m tdccl.aot build",
                stacklevel=2,
            )
    return packs


def load(identity: str, capability: tuple[int, int]) -> Loaded | None:
    """The kernel of this identity on the current device, from the first pack that has it, or None."""
    arch, key = "sm_{}{}".format(*capability), key_of(identity)
    for pack in _found():
        try:
            kernel = pack.kernel(arch, key)
            if kernel is not None:
                return _load(kernel, pack.cubin(arch, key))
        except (*UNREADABLE, RuntimeError) as error:
            warnings.warn(f"tdccl: a kernel of the pack {pack.path} cannot be loaded: {error!r}", stacklevel=2)
        _log.debug("no kernel %s for %s in %s: %s", key, arch, pack.path, identity)
    return None


def _load(kernel: Kernel, cubin: bytes) -> Loaded:
    """Raises RuntimeError if the driver refuses."""
    from cuda.bindings import driver

    def check(result):
        status, *values = result
        if status:
            raise RuntimeError(f"{kernel.source}: {status!r}")
        return values[0] if values else None

    module = check(driver.cuModuleLoadData(cubin))
    function = check(driver.cuModuleGetFunction(module, kernel.name.encode()))
    if kernel.shared > _DEFAULT_SHARED:
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(function, limit, kernel.shared))
    return Loaded(int(function), kernel.shared, module, module)
