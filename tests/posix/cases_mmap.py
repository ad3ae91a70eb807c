"""Memory mappings: shared ones agree with read(2) and outlive close, private ones never reach the file."""

import mmap
import os
from pathlib import Path

from .support import MIB, PAGE, Child, case, gates, in_child, opened, pattern, rest, same, settle

CREATE = os.O_CREAT | os.O_RDWR


@case
def shared_write_is_seen_by_read(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.ftruncate(fd, 3 * PAGE)
        with mmap.mmap(fd, 3 * PAGE) as shared:
            shared[PAGE + 5 : PAGE + 11] = b"mapped"
            assert os.pread(fd, 8, PAGE + 4) == b"\0mapped\0"
            with opened(path / "file") as other:
                assert os.pread(other, 6, PAGE + 5) == b"mapped"


@case
def write_is_seen_in_a_shared_mapping(path: Path) -> None:
    (path / "file").write_bytes(pattern(2 * PAGE))
    with opened(path / "file", os.O_RDWR) as fd, mmap.mmap(fd, 2 * PAGE) as shared:
        same(shared[:], pattern(2 * PAGE))
        os.pwrite(fd, b"written", PAGE - 3)
        assert shared[PAGE - 3 : PAGE + 4] == b"written"


@case
def mapping_outlives_close(path: Path) -> None:
    file = path / "file"
    with opened(file, CREATE) as fd:
        os.ftruncate(fd, 1 * MIB)
        shared = mmap.mmap(fd, 1 * MIB)
    with shared:
        settle()
        shared[:] = pattern(1 * MIB)
        shared.flush()
        same(file.read_bytes(), pattern(1 * MIB))
        settle()
        shared[0:4] = b"late"
        shared.flush()
    same(file.read_bytes(), b"late" + pattern(1 * MIB)[4:])
    rest(file)
    same(file.read_bytes(), b"late" + pattern(1 * MIB)[4:])


@case
def mapping_then_rename(path: Path) -> None:
    # How tensors are saved: map a temporary file, fill it, close, rename.
    with opened(path / "tmp", CREATE | os.O_EXCL) as fd:
        os.ftruncate(fd, 5 * MIB)
        shared = mmap.mmap(fd, 5 * MIB)
    with shared:
        shared[:] = pattern(5 * MIB)
        os.rename(path / "tmp", path / "final")
        same((path / "final").read_bytes(), pattern(5 * MIB))
        shared[-3:] = b"END"
    same((path / "final").read_bytes(), pattern(5 * MIB)[:-3] + b"END")


@case
def mapping_of_a_resting_file_for_writing(path: Path) -> None:
    for name in ("file", "twin"):
        (path / name).write_bytes(pattern(5 * MIB))
        rest(path / name)
    with opened(path / "file", os.O_RDWR) as fd, mmap.mmap(fd, 5 * MIB) as shared:
        shared[4 * MIB - 2 : 4 * MIB + 2] = b"edge"
    same((path / "file").read_bytes(), pattern(5 * MIB)[: 4 * MIB - 2] + b"edge" + pattern(5 * MIB)[4 * MIB + 2 :])
    same((path / "twin").read_bytes(), pattern(5 * MIB))


@case
def private_mapping_never_reaches_the_file(path: Path) -> None:
    (path / "file").write_bytes(pattern(2 * PAGE))
    with opened(path / "file") as fd:
        private = mmap.mmap(fd, 2 * PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with private:
            private[0:7] = b"private"
            assert private[0:7] == b"private"
            same(os.pread(fd, 2 * PAGE, 0), pattern(2 * PAGE))
    same((path / "file").read_bytes(), pattern(2 * PAGE))


@case
def populated_private_mapping_reads_the_file(path: Path) -> None:
    (path / "file").write_bytes(pattern(4 * MIB + 123))
    rest(path / "file")
    populate = 0x8000  # MAP_POPULATE; Python 3.11 has no name for it on every build
    with opened(path / "file") as fd:
        mapped = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE | populate, prot=mmap.PROT_READ)
    with mapped:
        same(mapped[:], pattern(4 * MIB + 123))


@case
def shared_read_only_mapping(path: Path) -> None:
    (path / "file").write_bytes(pattern(3 * PAGE))
    with opened(path / "file") as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as shared:
        same(shared[:], pattern(3 * PAGE))
        try:
            mmap.mmap(fd, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE).close()
        except PermissionError:
            return
    raise AssertionError("a read-only descriptor was mapped for writing")


@case
def mapping_keeps_the_old_file_after_rename_over(path: Path) -> None:
    (path / "file").write_bytes(pattern(1 * MIB))
    (path / "next").write_bytes(pattern(1 * MIB, seed=1))
    with opened(path / "file") as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as shared:
        os.rename(path / "next", path / "file")
        settle()
        same(shared[:], pattern(1 * MIB))
        same((path / "file").read_bytes(), pattern(1 * MIB, seed=1))


@case
def mapping_of_an_unlinked_file(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.write(fd, pattern(2 * PAGE))
        shared = mmap.mmap(fd, 2 * PAGE)
        (path / "file").unlink()
    with shared:
        settle()
        same(shared[:], pattern(2 * PAGE))
        shared[:4] = b"gone"
        assert shared[:4] == b"gone"
    assert os.listdir(path) == []


@case
def msync_is_seen_by_another_process(path: Path) -> None:
    file = path / "file"
    with opened(file, CREATE) as fd:
        os.ftruncate(fd, 2 * PAGE)
        with mmap.mmap(fd, 2 * PAGE) as shared:
            shared[100:104] = b"sync"
            shared.flush(0, PAGE)

            def look() -> None:
                assert file.read_bytes()[99:105] == b"\0sync\0"

            in_child(look)


@case
def two_processes_share_a_mapping(path: Path) -> None:
    file = path / "file"
    file.write_bytes(bytes(PAGE))
    with gates(2) as (asked, answered):

        def answer() -> None:
            with opened(file, os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as shared:
                asked.wait()
                assert shared[:8] == b"question"
                shared[8:14] = b"answer"
                answered.open()

        child = Child(answer)
        with opened(file, os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as shared:
            shared[:8] = b"question"
            asked.open()
            answered.wait()
            assert shared[8:14] == b"answer"
        child.finish()
    assert file.read_bytes()[:15] == b"questionanswer\0"


@case
def last_page_is_zero_behind_the_end(path: Path) -> None:
    (path / "file").write_bytes(b"x" * 100)
    with opened(path / "file", os.O_RDWR) as fd:
        os.ftruncate(fd, 50)
        os.ftruncate(fd, 200)
        with mmap.mmap(fd, 200) as shared:
            assert shared[:] == b"x" * 50 + bytes(150)
            shared[199:200] = b"y"
        assert os.fstat(fd).st_size == 200
    assert (path / "file").read_bytes()[-2:] == b"\0y"


@case
def growing_file_is_mapped_again(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.ftruncate(fd, PAGE)
        with mmap.mmap(fd, PAGE) as shared:
            shared[:3] = b"one"
            shared.resize(3 * PAGE)
            shared[2 * PAGE : 2 * PAGE + 3] = b"two"
        assert os.fstat(fd).st_size == 3 * PAGE
    data = (path / "file").read_bytes()
    assert (data[:3], data[2 * PAGE : 2 * PAGE + 3], len(data)) == (b"one", b"two", 3 * PAGE)
