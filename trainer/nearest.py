"""What an unknown name was probably meant to be: the part of an error that names the nearest valid one."""

from collections.abc import Sequence
from difflib import get_close_matches

SHOWN = 20  # names in an error; the rest are counted


def nearest(value: str, known: Sequence[str]) -> str:
    """What to say of an unknown name: `the nearest is 'ball'; known: ball, star`, or that there are none."""
    if not known:
        return "none is known here"
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f"the nearest is {nearest_name(value, known)!r}; known: {', '.join(known[:SHOWN])}{more}"


def nearest_name(value: str, known: Sequence[str]) -> str:
    """The one of some names, at least one, that is spelt most like a value; upper and lower case count as the same."""
    lowered = {name.lower(): name for name in known}
    (match,) = get_close_matches(value.lower(), lowered, n=1, cutoff=0.0)
    return lowered[match]
