"""Moves of the random walk that take an open file or a mapping. As by_name.py."""

import os

from hypothesis import strategies as st

from . import calls
from .choosing import ACCESS, BIG, CONTENT, FLAGS, MODES, OFFSETS, PICK, SIZES, Choosing, Draw, content
from .sides import JUDGE, Bytes, Mapped, Opened


class ByHandle(Choosing):
    """Open files and mappings."""

    # --- handles

    def open(self, draw: Draw) -> None:
        pick = draw(PICK)
        access = draw(st.sampled_from(ACCESS))
        one = draw(st.sampled_from(FLAGS))
        two = draw(st.sampled_from(FLAGS))
        mode = draw(st.sampled_from(MODES))
        path, flags = self.name(pick) if pick % 2 else self.file(pick), access | one | two | os.O_NONBLOCK
        if flags & os.O_CREAT and flags & os.O_DIRECTORY:
            return  # what that means depends on the kernel's version
        opened = self.sides.open(path, flags, mode)
        if opened is not None:
            self.sides.compare_handle(opened)

    def close(self, draw: Draw) -> None:
        pick = draw(PICK)
        self.sides.close(self.opened(pick))

    def write(self, draw: Draw) -> None:
        pick = draw(PICK)
        what = draw(CONTENT)
        offset = draw(st.sampled_from(OFFSETS))
        at_position = draw(st.booleans())
        opened, data = self.opened(pick), content(*what)
        if opened.flags & os.O_DIRECT:
            return self.write_direct(opened, what[1], offset // calls.PAGE)

        def call(side: int) -> tuple[int, int]:
            fd = opened.fds[side]
            done = os.write(fd, data) if at_position else os.pwrite(fd, data, offset)
            return done, os.lseek(fd, 0, os.SEEK_CUR)

        self.sides.both(f"write {opened.path!r} {len(data)} at {'position' if at_position else offset}", call)
        return self.sides.compare_handle(opened)

    def write_direct(self, opened: Opened, seed: int, page: int) -> None:
        def call(side: int) -> int:
            with calls.mmap.mmap(-1, calls.PAGE) as buffer:
                buffer.write(content(calls.PAGE, seed))
                return os.pwrite(opened.fds[side], buffer, page * calls.PAGE)

        self.sides.both(f"direct write {opened.path!r}", call)
        self.sides.compare_handle(opened)

    def read(self, draw: Draw) -> None:
        pick = draw(PICK)
        size = draw(st.sampled_from([*SIZES, BIG]))
        offset = draw(st.sampled_from(OFFSETS))
        at_position = draw(st.booleans())
        opened = self.opened(pick)
        if opened.flags & os.O_DIRECT:
            aligned = offset // calls.PAGE * calls.PAGE
            pages = -(-size // calls.PAGE) * calls.PAGE
            self.sides.both(
                f"direct read {opened.path!r}", lambda side: Bytes(calls.pread_direct(opened.fds[side], pages, aligned))
            )
            return

        def call(side: int) -> tuple[Bytes, int]:
            fd = opened.fds[side]
            data = os.read(fd, size) if at_position else calls.pread_fully(fd, size, offset)
            return Bytes(data), os.lseek(fd, 0, os.SEEK_CUR)

        self.sides.both(f"read {opened.path!r} {size} at {'position' if at_position else offset}", call)

    def ftruncate(self, draw: Draw) -> None:
        pick = draw(PICK)
        size = draw(st.sampled_from([*SIZES, BIG, -1]))
        opened = self.opened(pick)
        self.sides.both(f"ftruncate {opened.path!r} {size}", lambda side: os.ftruncate(opened.fds[side], size))
        self.sides.compare_handle(opened)

    def fallocate(self, draw: Draw) -> None:
        pick = draw(PICK)
        mode = draw(st.sampled_from([0, 0, 1, 3, 3, 2, 8, 64]))
        offset = draw(st.sampled_from(OFFSETS))
        length = draw(st.sampled_from([*SIZES, -1]))
        opened = self.opened(pick)
        self.sides.both(
            f"fallocate {opened.path!r} {mode} {offset} {length}",
            lambda side: calls.fallocate(opened.fds[side], mode, offset, length),
        )
        self.sides.compare_handle(opened)

    def lseek(self, draw: Draw) -> None:
        pick = draw(PICK)
        offset = draw(st.sampled_from([*OFFSETS, -1]))
        whence = draw(st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]))
        opened = self.opened(pick)
        self.sides.both(f"lseek {opened.path!r} {offset} {whence}", lambda side: os.lseek(opened.fds[side], offset, whence))

    def seek_content(self, draw: Draw) -> None:
        """Where holes are may differ; what lies beyond the end may not."""
        pick = draw(PICK)
        offset = draw(st.sampled_from([*OFFSETS, 1 << 33]))
        whence = draw(st.sampled_from([os.SEEK_DATA, os.SEEK_HOLE]))
        opened = self.opened(pick)
        if offset >= os.fstat(opened.fds[JUDGE]).st_size:
            self.sides.both(f"seek {opened.path!r} {offset}", lambda side: os.lseek(opened.fds[side], offset, whence))

    def fsync(self, draw: Draw) -> None:
        pick = draw(PICK)
        data_only = draw(st.booleans())
        opened = self.opened(pick)
        self.sides.both(f"fsync {opened.path!r}", lambda side: (os.fdatasync if data_only else os.fsync)(opened.fds[side]))
        self.sides.compare_handle(opened)

    def copy_range(self, draw: Draw) -> None:
        one = draw(PICK)
        other = draw(PICK)
        size = draw(st.sampled_from(SIZES))
        start = draw(st.sampled_from(OFFSETS))
        to = draw(st.sampled_from(OFFSETS))
        source, target = self.opened(one), self.opened(other)
        if (source.flags | target.flags) & os.O_DIRECT:
            return

        def call(side: int) -> int:
            done = 0
            while done < size:
                got = os.copy_file_range(source.fds[side], target.fds[side], size - done, start + done, to + done)
                done += got
                if not got:
                    break
            return done

        self.sides.both(f"copy_file_range {source.path!r} {target.path!r} {size} {start} {to}", call)

    # --- mappings

    def map(self, draw: Draw) -> None:
        pick = draw(PICK)
        writable = draw(st.booleans())
        opened = self.opened(pick)
        if opened.flags & os.O_ACCMODE == os.O_RDWR or (not writable and opened.flags & os.O_ACCMODE == os.O_RDONLY):
            self.sides.map(opened, writable)

    def unmap(self, draw: Draw) -> None:
        pick = draw(PICK)
        self.sides.unmap(self.mapped(pick))

    def mapped(self, pick: int) -> Mapped:
        return self.sides.mappings[pick % len(self.sides.mappings)]

    def write_mapped(self, draw: Draw) -> None:
        pick = draw(PICK)
        offset = draw(st.sampled_from(OFFSETS))
        size = draw(st.sampled_from(SIZES))
        seed = draw(st.integers(0, 2))
        sync = draw(st.booleans())
        mapped = self.mapped(pick)
        size = min(size, mapped.end() - offset)
        if not mapped.writable or size <= 0:
            return
        self.sides.hazy.add(mapped.ino)
        for area in mapped.maps:
            area.write(offset, content(size, seed))
            if sync:
                area.sync()

    def read_mapped(self, draw: Draw) -> None:
        pick = draw(PICK)
        offset = draw(st.sampled_from(OFFSETS))
        size = draw(st.sampled_from([*SIZES, BIG]))
        mapped = self.mapped(pick)
        end = min(offset + size, mapped.end())
        self.sides.both("read_mapped", lambda side: Bytes(mapped.maps[side].read(offset, max(offset, end))))
