"""Work in several processes."""

import os
import signal

import pytest

from configs.errors import ConfigError
from data.parallel import ordered_map


def ends_itself(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_worker_that_is_killed_is_one_message():
    found = []
    with pytest.raises(ConfigError, match="data.workers=2: a worker process was ended from outside.*memory"):
        found += ordered_map(ends_itself, range(9), 2)
