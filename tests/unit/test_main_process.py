"""Messages of the main process, with the rank only where there are several."""

import logging

import pytest
from accelerate import PartialState

from trl_ulma.main_process import get_logger


@pytest.fixture
def state():
    """accelerate's state, which all loggers share."""
    found = PartialState()
    before = found.num_processes, found.process_index
    yield found
    found.num_processes, found.process_index = before


def test_one_process_has_no_rank(state, caplog):
    get_logger("trl_ulma.example").warning("Rows were left out: %d", 3)
    assert caplog.messages == ["Rows were left out: 3"]
    assert caplog.records[0].filename == "test_main_process.py"


def test_of_several_processes_the_main_one_logs(state, caplog):
    logger = get_logger("trl_ulma.example")
    state.num_processes = 2
    logger.warning("once")
    state.process_index = 1
    logger.warning("not on the others")
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("once")


def test_levels_are_those_of_logging(state, caplog):
    caplog.set_level(logging.ERROR, logger="trl_ulma.example")
    get_logger("trl_ulma.example").warning("not at this level")
    assert not caplog.messages
