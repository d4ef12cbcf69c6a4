"""Connections that hang, from a process of their own: both ends of 10,000 are more files than one may often have.

    python hanging.py HOST PORT

reads how many further ones to open, a number a line, and answers with how many it has opened. Each sends one of
`HALVES`, and every tenth vanishes at once. All others vanish when the process ends.
"""

from __future__ import annotations

import socket
import struct
import sys

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
HALVES = (b"", HEAD, HEAD + b"Content-Length: 100\r\n\r\n{", b"GET /livez HT")
RESET = struct.pack("ii", 1, 0)  # closing sends a reset


def main(host: str, port: int) -> None:
    held = list[socket.socket]()
    for line in sys.stdin:
        for number in range(len(held), len(held) + int(line)):
            client = socket.create_connection((host, port))
            client.sendall(HALVES[number % len(HALVES)])
            if number % 10 == 9:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                client.close()
            held.append(client)
        sys.stdout.write(f"{len(held)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
