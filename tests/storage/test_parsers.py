"""A short run of ``scripts/fuzz-files``."""

import pytest
from hypothesis import HealthCheck, given, settings
from kvoffload_storage.errors import IntegrityError
from parsers import PARSERS, WHOLE, as_json, parse_session, survives
from seeds import line_of, signed


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


def test_a_manifest_that_tells_of_a_petabyte_is_refused_without_memory_for_it():
    line = line_of(WHOLE["manifest.json"])
    line["state"]["n_bytes"] = 1 << 50
    with pytest.raises(IntegrityError, match="expected 1,125,899,906,842,624"):
        parse_session(WHOLE | {"manifest.json": signed(as_json(line))})
