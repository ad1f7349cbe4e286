"""Shows the dead letters of one reward: jobs that no worker answered, however often they were delivered."""

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from services.batching.errors import QueueAway
from services.batching.keys import Keys
from services.batching.streams import connect
from services.processes import StartError
from services.rewards import create_reward
from services.settings import Settings

COLUMNS = ("buried", "request", "job", "images", "deliveries", "submitted", "reason")


def show_dead(name: str, redis_url: str, settings: Settings, *, as_json: bool) -> int:
    """Print the dead letters of a reward's present version, the oldest first.

    Args:
        name: the reward, as `services.rewards.create_reward` knows it.
        redis_url: where the queue lives.
        settings: timeouts, and what the reward was told.
        as_json: one JSON object a line in place of a table.

    Returns:
        The exit code, 0.

    Raises:
        services.rewards.UnknownReward: there is no such reward.
        StartError: Redis cannot be reached.
    """
    reward = create_reward(name, settings.reward_options)  # by them it has another version, and another queue
    try:
        letters = asyncio.run(_read(redis_url, Keys(reward.name, reward.version), settings))
    except (RedisError, OSError) as error:
        raise StartError(f"{QueueAway.of(error)}: check that Redis runs and REDIS_URL names it") from error
    if as_json:
        for letter in letters:
            print(json.dumps(letter))
        return 0
    columns = [Column(name, overflow="fold") for name in COLUMNS]  # cut short, a request's name is of no use
    table = Table(*columns, title=f"Dead letters of {reward.name} {reward.version}: {len(letters)}")
    for letter in letters:
        table.add_row(*(Text(str(letter[column])) for column in COLUMNS))  # a request may be named like markup
    Console().print(table)
    return 0


async def _read(redis_url: str, keys: Keys, settings: Settings) -> list[dict[str, Any]]:
    redis = connect(redis_url, timeout_s=settings.redis_timeout_s)
    try:
        entries: Any = await redis.xrange(keys.dead)
    finally:
        await redis.aclose()
    return [_letter(entry.decode(), {k.decode(): v.decode() for k, v in fields.items()}) for entry, fields in entries]


def _letter(entry: str, fields: dict[str, str]) -> dict[str, Any]:
    return {
        "buried": _time(entry.partition("-")[0]),
        "request": fields["request"],
        "job": fields["uid"],
        "images": int(fields["images"]),
        "deliveries": int(fields["deliveries"]),
        "submitted": _time(fields["submitted"]),
        "reason": fields["reason"],
    }


def _time(milliseconds: str) -> str:
    """RFC 3339, UTC."""
    return datetime.fromtimestamp(int(milliseconds) / 1000, UTC).isoformat(timespec="milliseconds")
