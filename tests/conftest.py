"""Fixtures shared by the layers: an open store database, its namespace and index."""

import pytest

from cascadefs.database import Database
from cascadefs.index import Index
from cascadefs.namespace import Namespace


@pytest.fixture
def database(tmp_path):
    found = Database(tmp_path / "store")
    yield found
    found.close()


@pytest.fixture
def namespace(database):
    return Namespace(database)


@pytest.fixture
def index(database):
    return Index(database)
