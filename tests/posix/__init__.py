"""The POSIX contract of a folder: small functions of a directory, one behaviour each.

Owns the list of cases by topic, and how one is run: in a fresh folder of its own that is removed afterwards.
Does not know what file system the folder lies on, nor pytest. `python -m tests.posix FOLDER` runs them by hand.
1. A case is named "topic/function"; Linux tmpfs is the judge of what is right.
2. A case touches nothing outside its folder, except a folder it makes itself through `support.elsewhere`.
3. Every wait of a case is bounded.
"""

from . import (
    cases_attributes,
    cases_concurrency,
    cases_data,
    cases_directories,
    cases_links,
    cases_mmap,
    cases_names,
    cases_open_flags,
    cases_permissions,
    cases_programs,
    cases_rename,
    cases_sharing,
    cases_sparse,
    cases_times,
    cases_xattrs,
)
from .support import Case, cases_of, run_case

TOPICS = (
    cases_names,
    cases_open_flags,
    cases_data,
    cases_sharing,
    cases_sparse,
    cases_mmap,
    cases_attributes,
    cases_times,
    cases_permissions,
    cases_xattrs,
    cases_directories,
    cases_links,
    cases_rename,
    cases_concurrency,
    cases_programs,
)

CASES: dict[str, Case] = {name: case for topic in TOPICS for name, case in cases_of(topic).items()}

__all__ = ["CASES", "TOPICS", "Case", "run_case"]
