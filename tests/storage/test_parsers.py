"""A short run of ``scripts/fuzz-files``."""

import pytest
from hypothesis import HealthCheck, given, settings
from parsers import PARSERS, survives


@pytest.mark.parametrize("name", PARSERS)
def test_any_bytes_give_a_value_or_one_of_our_errors(name):
    parse, strategy = PARSERS[name]

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def check(data):
        survives(parse, data)

    check()
