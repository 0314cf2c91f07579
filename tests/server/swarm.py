"""Many clients at once, some of them bad. All in one thread, on bare sockets: they are to cost less than what they ask."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections import Counter
from itertools import count

# What clients do, and how many of a hundred do it.
KINDS = {"stream": 50, "whole": 12, "chat": 10, "leave": 10, "slow": 4, "malformed": 5, "invalid": 3, "huge": 2, "hang up": 2,
         "unknown": 2}
MALFORMED = (b"", b"{", b"[" * 5000, b'{"prompt": "x"', b"\xff\xfe", b"not json", b'{"prompt": "x"} {}')
MAX_BODY = 100_000  # the server's bound in these tests
PATIENCE = 120.0  # seconds after which a request counts as never answered


class Swarm:
    """Asks `number` requests, `clients` of them at once.

    Args:
        expected: the right answer to each prompt, with `max_tokens` and temperature 0.
    """

    def __init__(self, host, port, expected, max_tokens, *, clients, number, seed=0):
        self.host, self.port = host, port
        self.prompts, self.expected, self.max_tokens = list(expected), expected, max_tokens
        self.clients, self.number, self.seed = clients, number, seed
        self.seen = Counter()  # (kind, what came of it)
        self._numbers = count()

    async def run(self):
        await asyncio.gather(*(self._client() for _ in range(self.clients)))

    async def _client(self):
        while (number := next(self._numbers)) < self.number:
            luck = random.Random(self.seed * 1_000_000 + number)
            (kind,) = luck.choices(list(KINDS), list(KINDS.values()))
            try:
                came = await asyncio.wait_for(self._request(kind, luck), PATIENCE)
            except asyncio.TimeoutError:
                came = "never answered"
            except OSError as error:
                came = f"hung up on: {type(error).__name__}"
            self.seen[kind, came] += 1

    async def _request(self, kind, luck):
        prompt = luck.choice(self.prompts)
        body = {"model": "tiny", "prompt": prompt, "max_tokens": self.max_tokens, "temperature": 0, "stream": kind != "whole"}
        path, content = "/v1/completions", None
        if kind == "chat":
            path = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        elif kind == "invalid":
            body |= luck.choice([{"top_p": 7}, {"prompt": []}, {"temprature": 1}, {"n": 1000}, {"max_tokens": -1}, {"prompt": [5] * 9999}])
        elif kind == "unknown":
            body["model"] = "gpt-5"
        elif kind == "huge":
            body["prompt"] = "x" * (MAX_BODY * luck.choice([1, 3, 30]))
        elif kind == "slow":
            body |= {"max_tokens": 40, "ignore_eos": True, "logprobs": 10}
        elif kind == "malformed":
            content = luck.choice(MALFORMED)
        reader, writer = await self._connect(2048 if kind == "slow" else 2**16)
        try:
            return await self._exchange(kind, luck, prompt, path, json.dumps(body).encode() if content is None else content, reader, writer)
        finally:
            writer.close()

    async def _connect(self, limit):
        raw = socket.socket()
        raw.setblocking(False)
        if limit < 2**16:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, limit)
        await asyncio.get_running_loop().sock_connect(raw, (self.host, self.port))
        return await asyncio.open_connection(sock=raw, limit=limit)

    async def _exchange(self, kind, luck, prompt, path, content, reader, writer):
        head = (f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
                f"content-length: {len(content)}\r\n\r\n").encode()
        if kind == "hang up":
            writer.write((head + content)[: luck.randrange(1, len(head) + len(content))])
            await writer.drain()
            return "left"
        writer.write(head + content)
        if kind == "leave":
            await reader.read(luck.choice([1, 200, 700]))
            await asyncio.sleep(luck.choice([0, 0, 0.02]))
            return "left"
        if kind == "slow":
            answer = b""
            while piece := await reader.read(512):
                answer += piece
                await asyncio.sleep(0.005)
        else:
            answer = await reader.read(-1)
        return self._judge(kind, prompt, answer)

    def _judge(self, kind, prompt, answer):
        """What came, in a word. What should not have come is said in full."""
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else 0
        if status != 200:
            error = json.loads(body)["error"] if status else None
            return f"{status} {error['code'] or error['type']}" if error else "hung up on"
        if kind == "whole":
            text = json.loads(body)["choices"][0]["text"]
        else:
            chunks = [json.loads(line[6:]) for line in body.split(b"\r\n") for line in line.split(b"\n")
                      if line.startswith(b"data: ") and line != b"data: [DONE]"]
            if b"data: [DONE]" not in body or any("error" in chunk for chunk in chunks):
                return f"broken off: {body[-200:]!r}"
            text = "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for chunk in chunks
                           for choice in chunk["choices"])
        if kind in ("stream", "whole") and text != self.expected[prompt]:
            return f"wrong: {text!r} for {prompt!r}"
        return "completed"
