"""As much of HTTP/1.1 as it takes to post something and to read the answer as it comes.

A general client takes several times as long for each piece of a stream, and one that is busy sends its requests late.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

CONNECT_WITHIN = 10.0  # seconds
AT_ONCE = 2**16  # bytes


class HttpError(Exception):
    """There is no answer, or not all of it. The message says what became of the connection."""


@dataclass(frozen=True)
class Answer:
    """`pieces` are those of its body, as they come."""

    status: int
    pieces: AsyncIterator[bytes]


@asynccontextmanager
async def post(url: str, headers: dict[str, str], body: bytes) -> AsyncIterator[Answer]:
    """Over a connection of its own. Raises HttpError, also while the pieces are read."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    writer = None
    try:
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(parts.hostname, port, ssl=parts.scheme == "https" or None), CONNECT_WITHIN)
        writer.write(_head(parts.path, {"Host": parts.netloc.rpartition("@")[2], "Content-Length": str(len(body)),
                                        "Connection": "close", **headers}) + body)
        await writer.drain()
        status, fields = await _answered(reader)
        yield Answer(status, _pieces(reader, fields))
    except asyncio.TimeoutError:
        raise HttpError(f"no connection within {CONNECT_WITHIN:g} s") from None
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        raise HttpError(f"the connection broke off: {error}" if writer else f"no connection: {error}") from None
    finally:
        if writer is not None:
            writer.close()


def _head(path: str, headers: dict[str, str]) -> bytes:
    return "".join([f"POST {path} HTTP/1.1\r\n", *(f"{name}: {value}\r\n" for name, value in headers.items()), "\r\n"]).encode()


async def _answered(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status, and headers by their names in small letters."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    if not first.startswith("HTTP/1."):
        raise ValueError(f"this is no HTTP/1.1: {first[:80]!r}")
    pairs = (line.partition(":") for line in lines if line)
    return int(first.split()[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:  # it ends with the connection
        while piece := await reader.read(AT_ONCE):
            yield piece
