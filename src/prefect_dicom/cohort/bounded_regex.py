"""Regular expressions of users, refused where a text could keep them busy for long."""

from __future__ import annotations

import math
import re
import warnings
from functools import lru_cache
from re import _constants as opcodes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

LONGEST_TEXT = 64
"""Characters of a text that a regular expression is tried on: what LO holds, PS3.5 6.2."""
LONGEST_REGEX = 200
MOST_STEPS = 20_000_000
"""Of a regular expression on the longest text: about a fifth of a second."""


@lru_cache(maxsize=256)
def bounded_regex(expression: str) -> re.Pattern[str]:
    """A regular expression of a user's, if no text can keep it busy for long.

    Python's ``re`` tries one way after the other, and some expressions have more ways than could
    ever be tried; it cannot be stopped either. So the ways are counted before the expression is
    used, on the longest text it is given: each repetition multiplies them by the lengths it can
    have, each alternative adds its own. What multiplies without end (a repetition within a
    repetition, ``(a|b)*``) exceeds every bound and is refused, and so is what looks around or
    refers back, which ``*`` and lists of patterns do as well.

    Raises
    ------
    ValueError
        Says what is wrong and what to write instead, without repeating the expression.
    """
    if len(expression) > LONGEST_REGEX:
        raise ValueError(f"is longer than {LONGEST_REGEX} characters; write several")
    try:
        with warnings.catch_warnings(action="ignore"):
            compiled = re.compile(expression)
            tree = parser.parse(expression)
    except (re.error, OverflowError, RecursionError):
        raise ValueError("is no regular expression of Python's `re`") from None
    # It may begin to match at every place of the text.
    if _ways(tree) * (LONGEST_TEXT + 1) > MOST_STEPS:
        raise ValueError(
            "could take too long on some texts; leave out repetitions within repetitions, like "
            "(a+)* or (a|b)*, use fewer of .* and give several expressions instead of one"
        )
    return compiled


_ONE_WAY = frozenset(
    {
        opcodes.ANY,
        opcodes.AT,
        opcodes.CATEGORY,
        opcodes.IN,
        opcodes.LITERAL,
        opcodes.NOT_LITERAL,
        opcodes.RANGE,
    }
)
_REPEATS = frozenset({opcodes.MAX_REPEAT, opcodes.MIN_REPEAT, opcodes.POSSESSIVE_REPEAT})


def _ways(tree: Any) -> float:
    """An upper bound of the ways in which a part of an expression can be tried at one place."""
    ways = 1.0
    for operation, argument in tree:
        if operation in _ONE_WAY:
            continue
        if operation is opcodes.BRANCH:
            ways *= sum(_ways(each) for each in argument[1])
        elif operation is opcodes.SUBPATTERN:
            ways *= _ways(argument[-1])
        elif operation is opcodes.ATOMIC_GROUP:
            ways *= _ways(argument)
        elif operation in _REPEATS:
            least, most, repeated = argument
            ways *= _ways_to_repeat(repeated, least, most)
        else:
            raise ValueError("looks around or refers back; use patterns with *, or several")
        if ways > MOST_STEPS:
            return math.inf
    return ways


def _ways_to_repeat(repeated: Any, least: int, most: int) -> float:
    each = _ways(repeated)
    # Nothing repeated more often than the text has characters finds a place in it.
    times = min(most, LONGEST_TEXT)
    if each <= 1:
        return max(1, times - min(least, times) + 1)
    ways = 0.0
    for time in range(times + 1):
        ways += each**time
        if ways > MOST_STEPS:
            return math.inf
    return ways
