"""Images in shared memory, for an API and workers on one host: Redis then holds a reference in place of the pixels.

An API keeps a request's images in an anonymous file (`memfd_create(2)`), which goes with the API. A worker of the same
user opens it through `/proc` and maps it. One that cannot, because it runs elsewhere or the API is gone, says that the
images are lost; they are then submitted again through Redis. An API uses an area again when its request is over:
whatever a late worker makes of the next request's images, its reply is dropped like any late one.
"""

import asyncio
import contextlib
import fcntl
import json
import mmap
import os
import sys
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from services.processes import descriptor_limit

NAME_PREFIX = "reward-"
LEAST_BYTES = 2**18
MOST_AREAS = 256
"""Areas of an API: each takes two descriptors, for `mmap` keeps one of its own."""
DESCRIPTORS_OF_AN_AREA = 8
"""Of the descriptors that a process may have, for each area: three quarters are left for its connections."""
KEPT_AREAS = 64
"""Areas that wait for their next use in an API: as many as eight clients of eight requests at once have in use. Making
the memory anew takes longer than a small request's way through it."""
KEPT_BYTES = 2**26
"""Bytes of them, and likewise of those that a worker keeps mapped."""


def is_supported() -> bool:
    """Whether this system has anonymous files with seals, and `/proc`."""
    return sys.platform == "linux" and hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()


class Area:
    """Memory that other processes of this user can map; it takes what is written of it, not what it could hold."""

    def __init__(self, capacity: int) -> None:
        """Make it.

        Args:
            capacity: bytes.

        Raises:
            OSError: there is no descriptor, or no memory.
        """
        self.capacity = capacity
        self.name = NAME_PREFIX + uuid.uuid4().hex
        self._descriptor = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, capacity)
            # A reader must never find its mapping cut short.
            fcntl.fcntl(
                self._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            self.memory = memoryview(mmap.mmap(self._descriptor, capacity))
        except BaseException:
            os.close(self._descriptor)
            raise

    def reference(self, size: int, first: int, stop: int) -> str:
        """Say where a worker finds images `first` to `stop` of the safetensors file in the first `size` bytes."""
        return json.dumps([os.getpid(), self._descriptor, self.name, size, first, stop], separators=(",", ":"))

    def close(self) -> None:
        """Let go of it; what still refers to the memory keeps that."""
        os.close(self._descriptor)


class Areas:
    """The areas of one API; those that are free are used again, so that their memory need not be made anew.

    Threads may use it: pictures are laid out on those that decode them.
    """

    def __init__(self, *, enabled: bool) -> None:
        """Start with none; with `enabled` false, or where the system lacks what is needed, there never are any."""
        self._enabled = enabled and is_supported()
        self._lock = threading.Lock()
        self._free: list[Area] = []
        self._in_use = 0
        self._most = min(MOST_AREAS, descriptor_limit() // DESCRIPTORS_OF_AN_AREA)

    def take(self, size: int) -> Area | None:
        """Give an area of at least `size` bytes to one request; None where images must go through Redis."""
        if not self._enabled:
            return None
        capacity = max(LEAST_BYTES, 1 << (size - 1).bit_length())
        with self._lock:
            if self._in_use >= self._most:
                return None
            area = next((area for area in reversed(self._free) if area.capacity == capacity), None)
            if area is not None:
                self._free.remove(area)
            else:
                while self._free and self._in_use + len(self._free) >= self._most:
                    self._free.pop(0).close()
                try:
                    area = Area(capacity)
                except OSError:
                    return None
            self._in_use += 1
            return area

    def give(self, area: Area, *, reusable: bool) -> None:
        """Take an area back from a request that is over, to use it again unless something may still write to it."""
        with self._lock:
            self._in_use -= 1
            if reusable:
                self._free.append(area)
            else:
                area.close()
            while len(self._free) > KEPT_AREAS or sum(kept.capacity for kept in self._free) > KEPT_BYTES:
                self._free.pop(0).close()

    @contextlib.contextmanager
    def lease(self) -> Iterator["Lease"]:
        """The shared memory of one request, which is given back when it is over."""
        lease = Lease(self)
        reusable = True
        try:
            yield lease
        except asyncio.CancelledError:  # a thread of the request may still be at work
            reusable = False
            raise
        finally:
            area = lease.end()
            if area is not None:
                self.give(area, reusable=reusable)

    def close(self) -> None:
        """Let go of those that are free."""
        while self._free:
            self._free.pop().close()


class Lease:
    """The shared memory of one request: none until it is asked for, and then one area at most."""

    def __init__(self, of: Areas) -> None:
        self._of = of
        self._lock = threading.Lock()
        self._is_over = False
        self.area: Area | None = None

    def memory(self, size: int) -> memoryview | None:
        """Memory of `size` bytes, shared with the workers of this host; None where there is none, or the lease ended.

        A thread may ask for it that outlives its request.
        """
        with self._lock:
            if self._is_over:
                return None
            self.area = self._of.take(size)
            return None if self.area is None else self.area.memory[:size]

    def end(self) -> Area | None:
        """End the lease; return the area that is to be given back."""
        with self._lock:
            self._is_over = True
            return self.area


class MappedAreas:
    """The areas that a worker has mapped; the last used stay mapped for their next use."""

    def __init__(self) -> None:
        """Start with none."""
        self._mapped: OrderedDict[str, tuple[str, memoryview]] = OrderedDict()

    def find(self, reference: str) -> tuple[memoryview, int, int] | None:
        """Map what is referred to.

        Args:
            reference: of `Area.reference`, as it came through Redis: it is trusted to name an area, and no other file.

        Returns:
            The safetensors file, read-only, and which of its images are meant; None if it cannot be reached from here.
        """
        try:
            pid, number, name, size, first, stop = json.loads(reference)
            pid, number, size, first, stop = (int(value) for value in (pid, number, size, first, stop))
        except (ValueError, TypeError):
            return None
        if min(pid, number, first) < 0 or not size > 0 or not first < stop or not str(name).startswith(NAME_PREFIX):
            return None
        memory = self._memory(f"/proc/{pid}/fd/{number}", f"/memfd:{name} (deleted)")
        return None if memory is None or size > len(memory) else (memory[:size], first, stop)

    def forget_gone(self) -> None:
        """Unmap the areas that their API has closed."""
        for link, (path, _) in list(self._mapped.items()):
            if _link(path) != link:
                del self._mapped[link]

    def _memory(self, path: str, link: str) -> memoryview | None:
        if _link(path) != link:  # its API is gone, or a process of that number runs on another host
            return None
        if link not in self._mapped:
            memory = _map(path, link)
            if memory is None:
                return None
            self._mapped[link] = (path, memory)
            while sum(len(kept) for _, kept in self._mapped.values()) > KEPT_BYTES and len(self._mapped) > 1:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(link)
        return self._mapped[link][1]


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _map(path: str, link: str) -> memoryview | None:
    """Map an area, if it still is the one that is meant and cannot shrink."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    try:
        if _link(f"/proc/self/fd/{descriptor}") != link:
            return None
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            return None
        return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
    except (OSError, ValueError):
        return None
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
