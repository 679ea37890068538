"""Clients of an OpenAI-compatible server, in a process of their own: ask, read streams, print one JSON line.

Started by `benchmarks/serving.py`; by hand:

    python benchmarks/serving_load.py --url http://127.0.0.1:8000 --model glm-tiny --clients 16 --tokens 128
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

REFUSALS = (429, 503)
"""What a server says that is full, or that drains: documented, no error."""


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
        tokens: generated, by the servers' own usage.
        first: seconds to the first text of each request.
        waits: the longest wait between two pieces of each request, seconds.
        refused: replies of `REFUSALS`.
        left: requests given up by their client on purpose.
        errors: anything else that went wrong, in words.
        health: seconds of every `/health`.
    """

    tokens: int = 0
    first: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    refused: int = 0
    left: int = 0
    errors: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)


def body(options: argparse.Namespace, number: int) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request: greedy, of fixed length, another prompt each."""
    common = {
        "model": options.model,
        "temperature": 0,
        "max_tokens": options.tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.api == "completions":
        chance = random.Random(options.seed + number)
        prompt = [chance.randrange(100, options.vocab) for _ in range(options.prompt)]
        return "/v1/completions", {**common, "prompt": prompt}
    question = f"{number + options.seed}+{number * 7 % 90}等于多少？" + "请再说一遍。" * (options.prompt // 8)
    return "/v1/chat/completions", {**common, "messages": [{"role": "user", "content": question}]}


async def events(reply: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a stream of events."""
    async for line in reply.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


async def ask(client: httpx2.AsyncClient, options: argparse.Namespace, number: int, seen: Seen) -> None:
    """Send one request and read its stream, or leave in the middle of it."""
    path, content = body(options, number)
    leave_after = random.Random(number).randrange(1, options.tokens) if options.leave else None
    start = last = time.perf_counter()
    longest, num_pieces = 0.0, 0
    try:
        async with client.stream("POST", path, json=content) as reply:
            if reply.status_code in REFUSALS:
                seen.refused += 1
                await asyncio.sleep(0.05)
                return
            if reply.status_code != 200:
                seen.errors.append(f"{reply.status_code} {(await reply.aread())[:200]!r}")
                return
            async for event in events(reply):
                if "error" in event:
                    seen.errors.append(str(event["error"])[:200])
                if event.get("usage"):
                    seen.tokens += event["usage"]["completion_tokens"]
                if not event.get("choices"):
                    continue
                now = time.perf_counter()
                if num_pieces == 1:
                    seen.first.append(now - start)
                elif num_pieces > 1:
                    longest = max(longest, now - last)
                last, num_pieces = now, num_pieces + 1
                if leave_after is not None and num_pieces > leave_after and number % 2:
                    seen.left += 1
                    return
    except (httpx2.HTTPError, ValueError) as error:
        seen.errors.append(f"{type(error).__name__}: {error}"[:200])
    seen.waits.append(longest)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Let every client send its requests one after the other, for a number of requests or of seconds."""
    seen = Seen()
    numbers = iter(range(10**9))
    end = time.perf_counter() + options.seconds if options.seconds else None
    limits = httpx2.Limits(max_connections=options.clients + 4)
    async with httpx2.AsyncClient(base_url=options.url, timeout=600, limits=limits) as client:

        async def one() -> None:
            for _ in range(10**9 if end else options.requests):
                if end and time.perf_counter() > end:
                    return
                await ask(client, options, next(numbers), seen)

        async def look() -> None:
            while options.health:
                start = time.perf_counter()
                reply = await client.get("/health")
                seen.health.append(time.perf_counter() - start)
                if reply.status_code != 200:
                    seen.errors.append(f"/health {reply.status_code}")
                await asyncio.sleep(0.1)

        watching = asyncio.create_task(look())
        start = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(options.clients)))
        seconds = time.perf_counter() - start
        watching.cancel()
    return {
        "tokens": seen.tokens,
        "seconds": seconds,
        "tokens_per_second": seen.tokens / seconds,
        "first_median": statistics.median(seen.first) if seen.first else None,
        "longest_wait": max(seen.waits, default=0.0),
        "requests": len(seen.waits),
        "refused": seen.refused,
        "left": seen.left,
        "errors": seen.errors[:10],
        "num_errors": len(seen.errors),
        "health_longest": max(seen.health, default=0.0),
        "health_looks": len(seen.health),
    }


def main() -> None:
    """Read the command line, ask, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1, help="of each client, one after the other")
    parser.add_argument("--seconds", type=float, help="instead of a number of requests")
    parser.add_argument("--tokens", type=int, default=128, help="of every answer")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of every prompt, roughly for chat")
    parser.add_argument("--vocab", type=int, default=4000, help="token ids of prompts are below it")
    parser.add_argument("--api", choices=["chat", "completions"], default="chat")
    parser.add_argument("--leave", action="store_true", help="every second request is given up midway")
    parser.add_argument("--health", action="store_true", help="look at /health ten times a second")
    parser.add_argument("--seed", type=int, default=0)
    sys.stdout.write(json.dumps(asyncio.run(run(parser.parse_args()))) + "\n")


if __name__ == "__main__":
    main()
