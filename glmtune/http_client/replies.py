"""What an answer over HTTP holds: JSON read within limits, and what is said in it of a failure.

A server may be broken, of another kind, or hostile: it may send brackets nested without end, or numbers of a
million digits.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MAX_DIGITS = 20
"""Of a whole number in an answer: Python takes quadratic time to read one."""


def parse_json(data: bytes) -> Any:
    """Return the JSON in a body; raises ValueError with words for it."""
    try:
        return json.loads(data.decode("utf-8-sig"), parse_int=_whole_number)
    except UnicodeDecodeError:
        raise ValueError("no UTF-8") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {sys.getrecursionlimit()} levels, the limit") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos:,}") from None


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, but {MAX_DIGITS} are the limit")
    return int(digits)


def error_message(content: Any) -> str:
    """Return what a refusal says, wherever servers put it."""
    inner = content.get("error") or content.get("detail") or content if isinstance(content, dict) else content
    said = inner.get("message") or inner if isinstance(inner, dict) else inner
    if isinstance(said, str):
        return said
    keys = ", ".join(map(str, list(said)[:8])) if isinstance(said, dict) else ""
    return keys and f"an object with {keys}"
