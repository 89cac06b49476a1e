"""A short run of ``scripts/fuzz-files``."""

import pytest
from hypothesis import HealthCheck, given, settings
from parsers import PARSERS, survives


@pytest.mark.parametrize("name", PARSERS)
def test_what_the_fuzzers_start_from_is_taken_as_it_is(name):
    PARSERS[name].parse(PARSERS[name].seed)


@pytest.mark.parametrize("name", PARSERS)
def test_any_bytes_give_a_value_or_one_of_our_errors(name):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(PARSERS[name].inputs)
    def check(data):
        survives(PARSERS[name].parse, data)

    check()
