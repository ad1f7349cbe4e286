"""What an unknown name was probably meant to be: the part of an error that names the nearest valid one."""

from collections.abc import Sequence
from difflib import get_close_matches

SHOWN = 20  # names in an error; the rest are counted


def nearest(value: str, known: Sequence[str]) -> str:
    """What to say of an unknown name: `the nearest is 'ball'; known: ball, star`, or that there are none."""
    if not known:
        return "none is known here"
    lowered = {name.lower(): name for name in known}
    (match,) = get_close_matches(value.lower(), lowered, n=1, cutoff=0.0)
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f"the nearest is {lowered[match]!r}; known: {', '.join(known[:SHOWN])}{more}"
