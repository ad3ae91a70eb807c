"""Public judges on a mount: stress-ng's filesystem stressors with --verify, and fio jobs that read back what they wrote.

Owns: which stressors and jobs, and for how long. tmpfs goes first: what fails there proves nothing about the mount.
`make torture` sets JUDGE_SECONDS: then each stressor runs alone for so long, with four processes.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("JUDGE_SECONDS", "0"))
SHORT_S = 1
# Left out: stressors that change the machine (bind-mount, ramfs, swap), that need a device (rawdev, verity, loop), that do not
# look at the folder (eventfd, ioprio, procfs), and io-uring, which tmpfs fails (it expects a fixed order of completions).
STRESSORS = " ".join(
    [
        "access aio aiol chattr chdir chmod chown copy-file dentry dir dirdeep dirmany dnotify dup fallocate fanotify",
        "fcntl fiemap file-ioctl filename flock fpunch fsize fstat getdent handle hdd inode-flags inotify io iomix",
        "lease link locka lockf lockofd madvise mincore mknod mmap mmapaddr mmapfork mmapmany msync msyncmany null open",
        "readahead remap rename revio seek sendfile splice symlink sync-file tee touch utime xattr",
    ]
).split()
CHECK = [
    "--verify=crc32c",
    "--verify_fatal=1",
    "--do_verify=1",
    "--verify_state_save=0",
    "--size=8m",
    "--thread=0",
    "--randrepeat=1",
    "--minimal",
]
JOBS = {
    "sequential": ["--rw=write", "--bs=128k"],
    "random": ["--rw=randwrite", "--bs=4k"],
    "mixed": ["--rw=randrw", "--bs=4k-64k", "--fsync=64"],
    "mmap": ["--rw=randwrite", "--bs=4k", "--ioengine=mmap"],
    "direct": ["--rw=randwrite", "--bs=4k", "--direct=1"],
    "libaio": ["--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=16"],
    "io_uring": ["--rw=randwrite", "--bs=16k", "--ioengine=io_uring", "--iodepth=16"],
    "four_processes": ["--rw=randwrite", "--bs=4k", "--numjobs=4"],
}


def need(program):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing: apt-get install {program} (make test does)")


@pytest.fixture(params=["tmpfs", "passthrough", "portable"], scope="module")
def folder(request):
    base = Path("/dev/shm") if request.param == "tmpfs" else Path(request.getfixturevalue(f"mount_{request.param}"))
    found = Path(tempfile.mkdtemp(prefix="judges-", dir=base))
    yield found
    shutil.rmtree(found)


def run(command, limit_s, cwd="/"):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=limit_s, check=False, stdin=subprocess.DEVNULL, cwd=cwd
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.mark.timeout(3600 if SECONDS else 120)
def test_stress_ng_verifies(folder):
    need("stress-ng")
    if folder.is_relative_to("/dev/shm") and not SECONDS:
        pytest.skip("tmpfs proves the stressors in the long form")
    common = ["--temp-path", str(folder), "--verify", "--quiet"]
    if SECONDS:
        for name in STRESSORS:
            run(["stress-ng", f"--{name}", "4", "--timeout", f"{SECONDS}s", *common], SECONDS + 120)
    else:
        run(["stress-ng", *(f"--{name}=1" for name in STRESSORS), "--timeout", f"{SHORT_S}s", *common], 110)


@pytest.mark.parametrize("job", JOBS)
def test_fio_reads_back_what_it_wrote(folder, job):
    need("fio")
    times = ["--time_based=0", f"--loops={10 if SECONDS else 1}"]
    run(["fio", f"--name={job}", f"--directory={folder}", *CHECK, *times, *JOBS[job]], 600 if SECONDS else 100, folder)
    for file in folder.glob(f"{job}*"):
        file.unlink()
