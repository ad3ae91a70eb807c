"""How the reader of the device is scheduled: on the core of the program that it answers, before others."""

import itertools
import os
import struct
import threading
import time
from pathlib import Path

import pytest
from t5_creates import FOLDER, GETATTR, Maker

ROUNDS = 20
PAUSE_S = 0.003
LOOK_EVERY = 16  # requests


def core_of(thread):
    """Where a thread of ours ran last."""
    return int(Path(f"/proc/self/task/{thread}/stat").read_text().rsplit(")", 1)[1].split()[36])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_the_reader_goes_where_its_caller_waits(tmp_path):
    maker, leave = Maker(tmp_path), threading.Event()
    caller = threading.Thread(target=lambda: all(not leave.wait(PAUSE_S / 10) for _ in itertools.count()))
    caller.start()
    allowed, followed = sorted(os.sched_getaffinity(0)), 0
    reader = maker.threads[0].native_id
    try:
        for at in range(ROUNDS):
            core = allowed[at % 2]
            os.sched_setaffinity(caller.native_id, {core})
            time.sleep(PAUSE_S)
            head = struct.pack("<IIQQIIIHH", 56, GETATTR, 2 * at, FOLDER, 0, 0, caller.native_id, 0, 0)
            for _ in range(LOOK_EVERY):
                maker.kernel.send(head + bytes(16))
                maker.answered()
            time.sleep(PAUSE_S)  # it moves when it has answered
            followed += core_of(reader) == core
            assert os.sched_getaffinity(reader) == set(allowed)  # moved, not bound
    finally:
        leave.set()
        caller.join()
        maker.close()
    assert followed > ROUNDS * 3 // 4  # by chance it would be half of them


def test_a_caller_that_cannot_be_looked_at_is_answered(tmp_path):
    maker = Maker(tmp_path)
    try:
        for thread in (0, 2**31 - 1):
            maker.kernel.send(struct.pack("<IIQQIIIHH", 56, GETATTR, 8, FOLDER, 0, 0, thread, 0, 0) + bytes(16))
            assert maker.answered()[0] == 0
    finally:
        maker.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="priority needs root")
def test_the_reader_goes_before_others(tmp_path):
    maker = Maker(tmp_path)
    try:
        reader, other = (thread.native_id for thread in maker.threads)
        maker.ask(GETATTR, bytes(16))
        maker.answered()
        assert os.getpriority(os.PRIO_PROCESS, reader) == -20
        assert os.getpriority(os.PRIO_PROCESS, other) == os.getpriority(os.PRIO_PROCESS, 0) > -20
    finally:
        maker.close()
