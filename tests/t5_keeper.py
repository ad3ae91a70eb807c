"""What outlives a worker: the decision to start the next one, the table in shared memory, operations that happen once."""

import os
import signal

import pytest

from cascadefs.metadata.namespace import ROOT
from cascadefs.mount.fuse.handover import HANDLES, KeptHandle, Table
from cascadefs.mount.fuse.resent import RESENT, Once
from cascadefs.mount.keeper import CRASHES_MAX, KILLS_MAX, SHORT_LIFE_S, Death, plan_restart

CRASH, KILL, LONG = Death(signal.SIGSEGV, 0.1), Death(signal.SIGKILL, 0.1), Death(signal.SIGSEGV, SHORT_LIFE_S)
FAILED = Death(1 << 8, 0.1)


@pytest.mark.parametrize(
    ("deaths", "given_up"),
    [
        ([CRASH], False),
        ([KILL] * 50, False),
        ([KILL] * KILLS_MAX, True),
        ([CRASH] * (CRASHES_MAX - 1), False),
        ([CRASH] * CRASHES_MAX, True),
        ([FAILED] * CRASHES_MAX, True),
        ([CRASH] * CRASHES_MAX + [LONG], False),
        ([CRASH] * CRASHES_MAX + [LONG] + [CRASH] * (CRASHES_MAX - 1), False),
        ([KILL, CRASH] * CRASHES_MAX, True),
    ],
)
def test_a_worker_is_given_up_only_after_many_short_lives(deaths, given_up):
    assert (plan_restart(deaths) is None) == given_up


def test_a_death_says_how_and_after_what_time():
    assert str(KILL) == "SIGKILL after 0.1 s" and str(FAILED) == "exit code 1 after 0.1 s"


def test_the_next_worker_finds_what_the_last_one_left():
    first = Table.make()
    first.generation = 1
    first.init_request, first.first_ino = b"init", 1000
    handles = [KeptHandle(fh, fh * 2, fh * 3, fh, fh % 2 == 0, fh == 5, fh == 6) for fh in range(1, 9)]
    for handle in handles:
        first.add_handle(handle)
        first.add_backing(handle.backing_id)
    first.remove_handle(3)
    first.remove_backing(4)
    second = Table(os.dup(first.fd))
    second.generation += 1
    assert second.handles() == [handle for handle in handles if handle.fh != 3]
    assert sorted(second.backings()) == [1, 2, 3, 5, 6, 7, 8]
    assert second.init_request == b"init" and second.first_ino == 1000 + (1 << 32)
    second.remove_handle(5)
    second.add_handle(KeptHandle(99, 1, 1, 0, False, False))
    assert {handle.fh for handle in second.handles()} == {1, 2, 4, 6, 7, 8, 99}
    for table in (first, second):
        os.close(table.fd)


def test_a_full_table_records_nothing_more_and_goes_on():
    table = Table.make()
    for fh in range(1, HANDLES + 3):
        table.add_handle(KeptHandle(fh, 1, 1, 0, False, False))
    assert len(table.handles()) == HANDLES
    table.remove_handle(HANDLES + 2)
    table.remove_handle(1)
    table.add_handle(KeptHandle(HANDLES + 9, 1, 1, 0, False, False))
    assert len(table.handles()) == HANDLES
    os.close(table.fd)


class Requests:
    """In the place of the transport: the token is the index of a request."""

    def __init__(self, *uniques: int) -> None:
        self.uniques = uniques

    def request_of(self, token: int) -> int:
        return self.uniques[token]


class Context:
    def __init__(self, pid: int) -> None:
        self.pid = pid


def test_what_was_committed_is_done_and_what_was_not_is_not(namespace):
    table = Table.make()
    first = Once(table, Requests(2, 4, 6), namespace)
    with first.operation(Context(0), ROOT) as op:
        namespace.make_in(ROOT, b"a", 0o100644, 0, 0, op=op)
    with pytest.raises(FileExistsError), first.operation(Context(1), ROOT) as op:
        namespace.make_in(ROOT, b"a", 0o100644, 0, 0, op=op)
    with first.operation(Context(2), ROOT):
        pass  # the worker dies before its transaction
    second = Once(table, Requests(2 | RESENT, 4 | RESENT, 6 | RESENT, 2), namespace)
    assert [second.is_done(Context(i)) for i in range(4)] == [True, False, False, False]
    with second.operation(Context(2), ROOT) as op:
        namespace.unlink(ROOT, b"a", op)
    third = Once(table, Requests(2 | RESENT, 4 | RESENT, 6 | RESENT), namespace)
    assert [third.is_done(Context(i)) for i in range(3)] == [True, False, True]
    os.close(table.fd)
