"""Tools that misbehave, each in its own way, for worker processes to survive."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time

from rest_mega.environments import ToolEnvironment, ToolError, tool


class Hostile(ToolEnvironment):
    """Nothing here may end, fill or corrupt the process that asks."""

    @tool(isolated=True)
    @staticmethod
    def add(a: int, b: int) -> int:
        """Behave."""
        return a + b

    @tool(isolated=True)
    @staticmethod
    def process() -> int:
        """The id of the process that runs this."""
        return os.getpid()

    @tool(isolated=True)
    @staticmethod
    def loop() -> int:
        """Run for ever."""
        while True:
            pass

    @tool(isolated=True)
    @staticmethod
    def family(path: str) -> int:
        """Start a child, write down both ids, and wait for ever."""
        child = os.fork()
        if child == 0:
            time.sleep(3600)
        with open(path, "w") as file:
            file.write(f"{os.getpid()} {child}")
        time.sleep(3600)
        return child

    @tool(isolated=True)
    @staticmethod
    def hog() -> int:
        """Take all memory."""
        blocks = []
        while True:
            blocks.append(bytearray(1 << 24))

    @tool(isolated=True)
    @staticmethod
    def leave(code: int) -> int:
        """End the process."""
        os._exit(code)

    @tool(isolated=True)
    @staticmethod
    def crash() -> int:
        """Read where nothing is."""
        return ctypes.string_at(0)[0]

    @tool(isolated=True)
    @staticmethod
    def flood(size: int) -> str:
        """Return much, and print much."""
        sys.stdout.write("noise\n" * 10_000)
        return "x" * size

    @tool(isolated=True)
    @staticmethod
    def recurse() -> int:
        """Call itself for ever."""
        return Hostile.recurse() + 1

    @tool(isolated=True)
    @staticmethod
    def linger() -> int:
        """Leave a thread behind."""
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
        return os.getpid()

    @tool(isolated=True)
    @staticmethod
    def refuse(words: int) -> int:
        """Refuse, in few words or many."""
        raise ToolError("not today " * words)
