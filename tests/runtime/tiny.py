"""The built-in ``tiny`` shape, and a configuration whose pages and windows are small enough for short prompts."""

from kvoffload.models.catalog import LoadedModel, load_model, resolve

TIERS = ["none", "cpu", "nvme"]
SMALL = {"sinks": 4, "recent": 8, "page_size": 4, "budget": "10%", "self_test": False}


def load() -> LoadedModel:
    return load_model(resolve("tiny"), dtype="float32", device="cpu")
