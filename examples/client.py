#!/usr/bin/env python3
"""A client of kmutex in Python's standard library; docs/protocol.md describes the protocol.

    client.py SOCKET KEY COMMAND...

Runs COMMAND if the lock of KEY is free. If another client holds it, waits until that one has finished, and exits with 79.
"""
import json
import socket
import subprocess
import sys


class Client:
    """A connection, which holds one lock at a time. Closing it releases the lock."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.answers = self.socket.makefile("rb")
        self.socket.sendall(b"\0kmutex proto 2\n")
        self.answer("hello")

    def answer(self, *kinds):
        """Returns the next answer, which must be of one of these types."""
        answer = json.loads(self.answers.readline() or '{"type": "end of stream"}')
        if answer["type"] not in kinds:
            raise RuntimeError(answer.get("message", answer["type"]))
        return answer

    def request(self, **request):
        self.socket.sendall(json.dumps(request).encode() + b"\n")

    def lock(self, key, **options):
        """Returns the token of the lock, or None if another client did the work while this one waited."""
        self.request(type="lock", key=key, **options)
        answer = self.answer("granted", "waiting", "finished")
        while answer["type"] == "waiting":
            answer = self.answer("granted", "waiting", "finished")
        return answer["token"] if answer["type"] == "granted" else None

    def release(self, status):
        self.request(type="release", outcome={"exit": status})
        self.answer("released")


if __name__ == "__main__":
    path, key, *command = sys.argv[1:]
    client = Client(path)
    if client.lock(key) is None:
        sys.exit(79)
    status = subprocess.call(command) & 0xFF
    client.release(status)
    sys.exit(status)
