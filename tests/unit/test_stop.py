"""One signal, or one that is repeated at once, asks a run to end; a second one ends it at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, time
from rest_mega import stop as module
module.SAME_SECONDS = float(sys.argv[1])
stop = module.Stop()
stop.watch()
print("ready", flush=True)
while not stop():
    time.sleep(0.01)
print("asked", flush=True)
time.sleep(60)
"""


def program(same_seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, str(same_seconds)]
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(
    first: signal.Signals, second: signal.Signals
) -> None:
    child = program(0.05)
    child.send_signal(first)
    assert line(child) == "asked\n"
    time.sleep(0.1)
    child.send_signal(second)
    assert child.wait(timeout=30) == -second


def test_what_a_launcher_repeats_at_once_is_one_request() -> None:
    child = program(60)
    child.send_signal(signal.SIGINT)
    assert line(child) == "asked\n"
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=0.3)
    child.kill()
    child.wait()


def test_the_handlers_are_given_back() -> None:
    from rest_mega.stop import Stop

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop = Stop()
    stop.watch()
    assert signal.getsignal(signal.SIGINT) not in before
    stop.release()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not stop()


FORKED = """
import os, signal, sys, time
from rest_mega.stop import Stop
stop = Stop()
stop.watch()
child = os.fork()
if child == 0:
    time.sleep(1)          # a signal ends the sleep's wait, not the sleep
    os._exit(7)
time.sleep(0.2)
os.kill(child, getattr(signal, sys.argv[1]))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop())
"""


@pytest.mark.parametrize(("name", "ending"), [("SIGINT", "7 False"), ("SIGTERM", "-15 False")])
def test_a_forked_writer_outlives_a_ctrl_c_but_not_its_parents_order(
    name: str, ending: str
) -> None:
    words = [sys.executable, "-c", FORKED, name]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == ending, done.stderr
