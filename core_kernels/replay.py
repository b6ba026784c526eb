"""Replays launches as one CUDA graph, where their tensors lie where they lay before.

A launch takes the host longer than a small kernel takes the GPU; a graph of launches is one call of the driver. It
holds the addresses of their tensors, and the allocators of training loops give a step those of the step before.

Stream capture and graphs: CUDA's driver API, https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GRAPH.html.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Hashable
from ctypes import byref, c_int, c_uint, c_uint64, c_void_p
from typing import Any

import torch

MOST = 64  # graphs in all, and launches that are remembered to have run once
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuStreamCreate": (c_void_p, c_uint),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, c_void_p),
    "cuGraphInstantiateWithFlags": (c_void_p, c_void_p, c_uint64),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
}
NON_BLOCKING, THREAD_LOCAL = 1, 1  # a stream that waits for no other; a capture that minds this thread alone


class Graph:
    """What the driver made of some launches. It may be let go of while it runs."""

    def __init__(self, handle: c_void_p) -> None:
        self.handle = handle
        weakref.finalize(self, driver().cuGraphExecDestroy, handle).atexit = False

    def replay(self, stream: int) -> None:
        if code := driver().cuGraphLaunch(self.handle, stream):
            raise RuntimeError(f"the CUDA driver could not launch a graph: error {code}")


_graphs: dict[Hashable, Graph | None] = {}  # nothing where the driver refused
_seen: dict[Hashable, None] = {}
_one_remembers = threading.Lock()


def replay(launches: Hashable, stream: int) -> bool:
    """Whether there was a graph of these launches, which tell of their tensors' addresses, to be replayed.

    While a caller's own graph is captured its launches are made one by one.
    """
    graph = _graphs.get(launches)
    if graph is None or torch.cuda.is_current_stream_capturing():
        return False
    graph.replay(stream)
    return True


def remember(launches: Hashable, launch: Callable[[int], None]) -> None:
    """That these launches, which ``launch`` makes on a stream, have been made.

    A graph is captured the second time: many addresses never come again. Where more than ``MOST`` take turns none does
    before it is forgotten, so that none is captured in vain.
    """
    if driver() is None or launches in _graphs or torch.cuda.is_current_stream_capturing():
        return
    if not _one_remembers.acquire(blocking=False):
        return
    try:
        if launches in _seen:
            del _seen[launches]
            _add(_graphs, launches, capture(launch))
        else:
            _add(_seen, launches, None)
    finally:
        _one_remembers.release()


def _add(table: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    if len(table) >= MOST:
        del table[next(iter(table))]
    table[key] = value


def capture(launch: Callable[[int], None]) -> Graph | None:
    """A graph of what ``launch`` launches, without running it; nothing if it cannot be captured."""
    stream = capturing_stream(torch.cuda.current_device())
    if stream is None or driver().cuStreamBeginCapture_v2(stream, THREAD_LOCAL):
        return None
    graph, handle = c_void_p(), c_void_p()
    try:
        launch(stream)
    except RuntimeError:  # of launches that have just run well
        driver().cuStreamEndCapture(stream, byref(graph))
        return None
    if driver().cuStreamEndCapture(stream, byref(graph)):
        return None
    refused = driver().cuGraphInstantiateWithFlags(byref(handle), graph, 0)
    driver().cuGraphDestroy(graph)
    return None if refused else Graph(handle)


@functools.cache
def capturing_stream(device: int) -> int | None:
    """A stream of our own, since another thread may be using any that torch has."""
    stream = c_void_p()
    return None if driver().cuStreamCreate(byref(stream), NON_BLOCKING) else stream.value


@functools.cache
def driver() -> Any:
    """NVIDIA's, or nothing."""
    if torch.version.hip is not None:
        return None
    try:
        library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in SIGNATURES.items():
            getattr(library, name).argtypes = arguments
    except (OSError, AttributeError):
        return None
    return library
