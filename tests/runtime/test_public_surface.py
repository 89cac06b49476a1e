"""What ``import kvoffload`` gives, and what it costs."""

import subprocess
import sys

import pytest

import kvoffload


@pytest.mark.parametrize("name", kvoffload.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(kvoffload, name) is not None


def test_the_public_surface_is_this():
    assert set(kvoffload.__all__) == {
        "KvoffloadError",
        "OffloadCache",
        "Progress",
        "Runtime",
        "RuntimeConfig",
        "SamplingConfig",
        "Session",
        "Stats",
        "StreamEvent",
        "__version__",
        "generate",
    }


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Sesion'"):
        _ = kvoffload.Sesion


def test_importing_the_package_loads_nothing_heavy():
    heavy = ["torch", "transformers", "triton", "numpy", "pydantic", "aiofiles", "asyncio", "kvoffload_storage"]
    program = f"import sys, kvoffload; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
