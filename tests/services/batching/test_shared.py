"""Images in shared memory: a worker sees what went through Redis otherwise, and nothing that is no area."""

import asyncio
import json
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from services.batching.shared import KEPT_AREAS, KEPT_BYTES, MOST_AREAS, Area, Areas, MappedAreas, is_supported
from services.http.bodies import prepare
from services.images import decode_batch, decode_json, encode_batch, encode_json
from services.protocol import Limits

pytestmark = pytest.mark.skipif(not is_supported(), reason="needs memfd_create and /proc")

IMAGES_BHWC = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
PROMPTS = ["a", "b", "ü", "d", "e"]


@pytest.mark.parametrize("form", ["safetensors", "json"])
def test_a_worker_finds_what_it_would_get_through_redis(form: str) -> None:
    """Images and prompts of every job are the same, read in place or through the plain way."""
    bounds = {"job_images": 2, "job_bytes": 2**20, "digests": False}
    areas, mapped = Areas(enabled=True), MappedAreas()
    with areas.lease() as lease:
        if form == "json":
            body: bytes | memoryview = encode_json(IMAGES_BHWC, PROMPTS)
            shared = prepare(decode_json, body, Limits(), lease=lease, **bounds)
            plain = prepare(decode_json, body, Limits(), **bounds)
        else:
            sent = encode_batch(IMAGES_BHWC, PROMPTS)
            body = lease.memory(len(sent)) or b""
            assert isinstance(body, memoryview)
            body[:] = sent
            shared = prepare(decode_batch, body, Limits(), lease=lease, **bounds)
            plain = prepare(decode_batch, sent, Limits(), **bounds)
        assert [len(job.images_BHWC) for job in shared.jobs] == [2, 2, 1]
        for ours, theirs in zip(shared.jobs, plain.jobs, strict=True):
            assert not theirs.shared
            found = mapped.find(ours.shared)
            assert found is not None
            payload, first, stop = found
            batch = decode_batch(payload, Limits()).part(slice(first, stop))
            through_redis = decode_batch(encode_batch(theirs.images_BHWC, theirs.prompts), Limits())
            assert batch.whole_BHWC is not None
            assert np.array_equal(batch.whole_BHWC, np.stack(through_redis.images_HWC))
            assert batch.prompts == through_redis.prompts


def test_pictures_of_several_sizes_go_through_redis() -> None:
    """They are no safetensors file."""
    bodies = [json.loads(encode_json(np.zeros((1, side, side, 3), np.uint8)))["images"][0] for side in (4, 5)]
    body = json.dumps({"images": bodies}).encode()
    with Areas(enabled=True).lease() as lease:
        prepared = prepare(decode_json, body, Limits(), job_images=2, job_bytes=2**20, digests=False, lease=lease)
    assert [job.shared for job in prepared.jobs] == ["", ""]


def test_only_an_area_is_opened(tmp_path: Path) -> None:
    """Redis is not trusted to name files: neither one on disk, nor another memfd, nor more than there is."""
    area, mapped = Area(2**18), MappedAreas()
    pid, number, name, *_ = json.loads(area.reference(100, 0, 1))
    assert mapped.find(area.reference(100, 0, 1)) is not None
    assert mapped.find(area.reference(2**18 + 1, 0, 1)) is None
    with (tmp_path / "secret").open("wb") as file:
        file.truncate(2**18)
        assert mapped.find(json.dumps([pid, file.fileno(), name, 100, 0, 1])) is None
    other = os.memfd_create("other")
    os.ftruncate(other, 2**18)
    assert mapped.find(json.dumps([pid, other, "other", 100, 0, 1])) is None
    unsealed = os.memfd_create("reward-unsealed")
    os.ftruncate(unsealed, 2**18)
    assert mapped.find(json.dumps([pid, unsealed, "reward-unsealed", 100, 0, 1])) is None
    for broken in ("", "[]", "null", "[1,2,3]", json.dumps([pid, number, name, 100, 1, 1]), '[-1,0,"reward-",1,0,1]'):
        assert mapped.find(broken) is None
    os.close(other)
    os.close(unsealed)
    area.close()


def test_what_its_api_has_closed_is_not_found() -> None:
    """Neither by a worker that had it mapped, which lets go of it."""
    area, mapped = Area(2**18), MappedAreas()
    reference = area.reference(100, 0, 1)
    assert mapped.find(reference) is not None
    area.close()
    assert mapped.find(reference) is None
    mapped.forget_gone()
    assert not mapped._mapped


def test_areas_are_bounded_and_used_again() -> None:
    """What is free is bounded in bytes, what is in use in number; beyond that there is the plain way."""
    areas = Areas(enabled=True)
    taken = [areas.take(1) for _ in range(areas._most)]
    assert len(taken) <= MOST_AREAS
    assert all(taken)
    assert areas.take(1) is None
    for area in taken:
        assert area is not None
        areas.give(area, reusable=True)
    again = areas.take(2)
    assert again in taken
    assert again is not None
    areas.give(again, reusable=True)
    large = areas.take(KEPT_BYTES)
    assert large is not None
    areas.give(large, reusable=True)
    assert sum(area.capacity for area in areas._free) <= KEPT_BYTES
    areas.close()
    assert Areas(enabled=False).take(1) is None


def open_descriptors() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/fd"))


def test_what_is_free_keeps_few_descriptors_from_connections() -> None:
    """However many requests there were at once; and areas of another size are closed for those that are wanted."""
    areas = Areas(enabled=True)
    before, most = open_descriptors(), areas._most
    for size in (1, 2**20):
        taken = [areas.take(size) for _ in range(most)]
        assert open_descriptors() - before <= 2 * most
        for area in taken:
            assert area is not None
            areas.give(area, reusable=True)
        del taken, area
        assert open_descriptors() - before <= 2 * KEPT_AREAS
    areas.close()
    assert open_descriptors() == before


def test_areas_leave_most_descriptors_to_connections() -> None:
    """Where the system allows a process few, images go through Redis sooner."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        areas = Areas(enabled=True)
        before = open_descriptors()
        taken = [areas.take(1) for _ in range(200)]
        assert open_descriptors() - before <= 1024 // 4
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for area in taken:
        if area is not None:
            areas.give(area, reusable=False)


def test_a_cancelled_request_leaves_no_area_for_others() -> None:
    """One of its threads may still write there."""
    areas = Areas(enabled=True)

    def request() -> None:
        with areas.lease() as lease:
            assert lease.memory(10) is not None
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        request()
    assert not areas._free
    assert areas._in_use == 0


def test_threads_that_take_and_give_at_the_same_time_get_areas_of_their_own() -> None:
    """Pictures are laid out on several threads, and given back by the event loop."""
    areas, used, problems = Areas(enabled=True), set(), []

    def take_and_give() -> None:
        for _ in range(3000):
            area = areas.take(1)
            if area is None or area.name in used:
                problems.append(area)
                return
            used.add(area.name)
            used.discard(area.name)
            areas.give(area, reusable=True)

    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(take_and_give) for _ in range(8)]:
                future.result()
    finally:
        sys.setswitchinterval(before_s)
    assert not problems
    areas.close()


def test_a_thread_that_outlives_its_request_gets_no_area() -> None:
    """Nobody would give it back."""
    areas = Areas(enabled=True)
    with areas.lease() as lease:
        pass
    assert lease.memory(10) is None
    with areas.lease() as lease:
        assert lease.memory(10) is not None
    assert areas._in_use == 0
    areas.close()
