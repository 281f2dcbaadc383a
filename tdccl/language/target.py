"""What stock Triton cannot interpret: the clock and the pause of a spinning wait.

On a GPU these are Triton functions; in emulation a Python function of the same name takes their
place. Everything else in `tdccl.language` is one source for all targets.
"""

import os
import time

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer
from triton.language.extra.hip import memrealtime

from tdccl.environment import emulated

# Decides what @triton.jit makes, so it must be set before the first kernel is read.
triton.knobs.runtime.interpret = emulated()
os.environ.pop("TRITON_INTERPRET", None)  # the knob leaves it there, for child processes that decide for themselves


def device(twin):
    """Makes a device function of a Triton one; in emulation the Python function `twin` takes its place."""
    return lambda function: twin if emulated() else triton.jit(function)


def _host_clock(BACKEND):
    return time.monotonic_ns()


def _host_pause(polls):
    # The peer that is waited for may need this core, and an interpreted poll costs a thousand sleeps.
    time.sleep(min(1e-3, 20e-6 * abs(int(polls))))


@device(_host_clock)
def clock_of(BACKEND: tl.constexpr):
    """`clock`, for who has no team at hand but knows its backend."""
    if BACKEND == "hip":
        return memrealtime() * 10
    else:
        return globaltimer()


@triton.jit
def clock(team):
    """Nanoseconds since some fixed moment, the same for all blocks of this rank."""
    return clock_of(team.backend)


@tl.core.builtin
def _threads_of(BACKEND, _semantic=None):
    """Threads of a block, a constant. (What a Triton function returns is none in Triton 3.6.)"""
    return tl.constexpr(_semantic.builder.options.num_warps * (64 if BACKEND == "hip" else 32))


threads_of = (lambda BACKEND: tl.constexpr(1)) if emulated() else _threads_of


@device(_host_pause)
def pause(polls):
    """Called between two polls of a wait; nothing on a GPU."""
    pass


# How often a wait looks at the clock and at this rank's stop word, and how often at the host's abort word, which
# lies across PCIe: when all blocks read it often, the reads alone hold peers up long enough to make them read too.
POLLS_A_CHECK = tl.constexpr(1 if emulated() else 64)
POLLS_A_LOOK_AT_HOST = tl.constexpr(1 if emulated() else 2048)
