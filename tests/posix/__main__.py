"""Runs the cases on any folder: `python -m tests.posix FOLDER [WORD...]` (only cases whose name holds a WORD).

Prints one line a failure and the time of each topic; the exit status is 1 if any case failed.
"""

import sys
import time
import traceback
from collections import defaultdict
from pathlib import Path

from . import CASES, run_case


def main(folder: Path, words: list[str]) -> int:
    chosen = [name for name in CASES if not words or any(word in name for word in words)]
    failed = 0
    seconds: dict[str, float] = defaultdict(float)
    for name in chosen:
        began = time.monotonic()
        try:
            run_case(name, CASES[name], folder)
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {''.join(traceback.format_exception(error)[-3:]).strip()}")
        seconds[name.split("/")[0]] += time.monotonic() - began
    print(", ".join(f"{topic} {spent:.1f} s" for topic, spent in seconds.items()))
    print(f"{len(chosen) - failed} of {len(chosen)} cases passed in {sum(seconds.values()):.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
