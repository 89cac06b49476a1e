"""Spellings of sizes, counts and budgets."""

import pytest

from kvoffload.units import Budget, format_size, parse_count, parse_size


@pytest.mark.parametrize(
    ("spelling", "n_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        (4096, 4096),
        ("16MiB", 16 << 20),
        ("16mib", 16 << 20),
        ("200G", 200 << 30),
        ("1.5GB", 1_500_000_000),
        ("1.5 GiB", 3 << 29),
        ("2k", 2048),
        ("3KB", 3000),
        ("1T", 1 << 40),
        ("7B", 7),
    ],
)
def test_sizes_with_a_plain_or_binary_unit_are_powers_of_1024_and_decimal_ones_of_1000(
    spelling: str | int, n_bytes: int
) -> None:
    assert parse_size(spelling) == n_bytes


@pytest.mark.parametrize(
    "spelling", ["", "G", "-1G", "5Q", "1.2.3M", "16i", "16iB", "nan", "1e3", "5%", "GiB16", "True"]
)
def test_what_is_no_size_is_refused_with_its_value_and_examples(spelling: str) -> None:
    with pytest.raises(ValueError, match=r"512MiB, 1.5GB or 200G") as refused:
        parse_size(spelling)
    assert repr(spelling) in str(refused.value)


@pytest.mark.parametrize(("spelling", "n_tokens"), [("8192", 8192), ("128k", 131072), ("1M", 1 << 20), ("1.5k", 1536)])
def test_context_lengths_count_in_powers_of_1024(spelling: str, n_tokens: int) -> None:
    assert parse_count(spelling) == n_tokens


@pytest.mark.parametrize("spelling", ["0", "-5", "k", "1.5", "12G", "lots"])
def test_what_is_no_context_length_is_refused(spelling: str) -> None:
    with pytest.raises(ValueError, match="8192 or 128k"):
        parse_count(spelling)


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5 GiB"), (3 << 50, "3072 TiB")]
)
def test_sizes_are_written_in_powers_of_1024(n_bytes: int, text: str) -> None:
    assert format_size(n_bytes) == text


@pytest.mark.parametrize(
    ("spelling", "tokens"),
    [("5%", 400.0), ("0.5 %", 40.0), ("100%", 8000.0), ("0%", 0.0), ("2048", 2048.0), ("0", 0.0), ("1MiB", 1024.0)],
)
def test_the_three_spellings_of_a_budget_are_one_notion(spelling: str, tokens: float) -> None:
    budget = Budget.parse(spelling)
    assert budget.tokens(8000, token_bytes=256, n_heads_total=4) == pytest.approx(tokens)
    assert str(budget) == spelling


def test_budgets_that_mean_the_same_are_equal() -> None:
    assert Budget.parse("1MiB") == Budget.parse("1024KiB") == Budget.parse(Budget.parse("1MB") and "1048576B")
    assert Budget.parse(2048) == Budget.parse("2048")


@pytest.mark.parametrize("spelling", ["", "x", "-5%", "-1", "101%", "16M", "2k", "5QiB", "nan%", "1e3", "2.5", "B"])
def test_a_malformed_budget_is_refused_with_its_value_and_the_three_spellings(spelling: str) -> None:
    with pytest.raises(ValueError, match=r"\(5%\), tokens \(2048\) or bytes a step \(16MiB\)") as refused:
        Budget.parse(spelling)
    assert repr(spelling) in str(refused.value)
