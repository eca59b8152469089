"""Messages between the ranks of one job, over a pair of sockets that nobody else can reach.

A message is a small JSON object and bytes. It is no pickle: a rank can be told
what to work on, and nothing else.
"""

from __future__ import annotations

import json
import socket
import struct
from array import array
from collections.abc import Sequence
from typing import Any

from lora_train import render

HEAD = struct.Struct("<II")


class Channel:
    """One end of a stream socket; sending and receiving may be two threads."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, said: dict[str, Any], load: bytes = b"") -> None:
        """Send one message; OSError when the other end is gone."""
        head = json.dumps(said).encode()
        self.socket.sendall(HEAD.pack(len(head), len(load)) + head + load)

    def receive(self) -> tuple[dict[str, Any], bytes] | None:
        """The next message, None at the end."""
        sizes = self._exactly(HEAD.size)
        if sizes is None:
            return None
        head_size, load_size = HEAD.unpack(sizes)
        head, load = self._exactly(head_size), self._exactly(load_size)
        if head is None or load is None:
            return None
        return json.loads(head), load

    def _exactly(self, size: int) -> bytes | None:
        parts, left = [], size
        while left:
            try:
                part = self.socket.recv(min(left, 1 << 20))
            except OSError:
                part = b""
            if not part:
                return None
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def packed(sequences: Sequence[render.Sequence]) -> tuple[list[list[int]], bytes]:
    """Sequences as [line, length] pairs and bytes: four for a token, one for its mask."""
    sizes = [[s.line, len(s.tokens)] for s in sequences]
    tokens = array("i", (t for s in sequences for t in s.tokens))
    masks = bytes(int(t) for s in sequences for t in s.trained)
    return sizes, tokens.tobytes() + masks


def unpacked(sizes: list[list[int]], load: bytes) -> list[render.Sequence]:
    """What `packed` was given."""
    total = sum(n for _, n in sizes)
    tokens = array("i")
    tokens.frombytes(load[: 4 * total])
    masks = load[4 * total :]
    out, at = [], 0
    for line, n in sizes:
        out.append(render.Sequence(line, tokens[at : at + n], masks[at : at + n]))
        at += n
    return out
