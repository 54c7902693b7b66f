import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def hub():
    """The helper module beside this file; importlib mode puts no test folder on the path."""
    spec = importlib.util.spec_from_file_location("hub", Path(__file__).with_name("hub.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
