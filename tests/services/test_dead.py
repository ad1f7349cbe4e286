"""`python -m services dead`: what was given up, for people and for machines."""

import json
from collections.abc import Callable

import pytest
from redis import Redis

from services.batching.keys import Keys
from services.rewards import create_reward
from services.rewards.options import RewardOptions
from tests.services.conftest import Process

pytestmark = pytest.mark.redis

LETTER = {"uid": "u-0", "request": "my-request", "reason": "given up after 3 deliveries", "images": 4, "deliveries": 4}


@pytest.fixture
def letters(redis_url: str) -> None:
    """One dead letter of version 1, and one of a version that is not ours."""
    with Redis.from_url(redis_url) as redis:
        for version in ("1", "2"):
            key = Keys("brightness", version).dead
            redis.xadd(key, {**LETTER, "submitted": 1_700_000_000_000, "uid": f"u-{version}"})
            redis.expire(key, 60)


@pytest.mark.usefixtures("letters")
def test_it_shows_the_dead_letters(start: Callable[..., Process], redis_url: str) -> None:
    """A table, or one JSON object a line; of the present version alone."""
    shown = start("dead", "brightness", "--json", REDIS_URL=redis_url)
    assert shown.wait() == 0
    (line,) = shown.rest_of_stdout().splitlines()
    letter = json.loads(line)
    assert letter["job"] == "u-1"
    assert letter["submitted"] == "2023-11-14T22:13:20.000+00:00"
    assert {name: letter[name] for name in ("request", "images", "deliveries", "reason")} == {
        name: LETTER[name] for name in ("request", "images", "deliveries", "reason")
    }
    table = start("dead", "brightness", REDIS_URL=redis_url, COLUMNS="200")
    assert table.wait() == 0
    text = table.rest_of_stdout().decode()
    assert "Dead letters of brightness 1: 1" in text
    assert "my-request" in text


def test_it_shows_the_letters_of_a_reward_as_it_is_told_to_be(start: Callable[..., Process], redis_url: str) -> None:
    """What a reward is told makes its version, and by that its queue."""
    reward = create_reward("mini-clip", RewardOptions(clip_prompt="a painting"))
    with Redis.from_url(redis_url) as redis:
        key = Keys(reward.name, reward.version).dead
        redis.xadd(key, {**LETTER, "submitted": 1_700_000_000_000})
        redis.expire(key, 60)
    for prompt, letters in (("a painting", 1), ("", 0)):
        shown = start("dead", "mini-clip", "--json", REDIS_URL=redis_url, REWARD_CLIP_PROMPT=prompt)
        assert shown.wait() == 0
        assert len(shown.rest_of_stdout().splitlines()) == letters


def test_without_redis_it_is_one_line(start: Callable[..., Process]) -> None:
    """And an exit code that is not 0."""
    shown = start("dead", "brightness", REDIS_URL="unix:///nonexistent/redis.sock")
    assert shown.wait() == 1
    assert shown.errors().startswith("error: Redis is not available")
    assert shown.errors().count("\n") == 1
