"""Replicas of ``kvoffload serve`` behind Ray Serve: one model and one set of tiers a replica, the same routes.

    pip install 'kvoffload[ray]'
    serve run examples.ray_serve:build_app model=smollm2-135m offload=nvme budget=5% replicas=2

Arguments are the settings of ``kvoffload serve`` (Ray listens, so port and grace are its own), and ``replicas``,
``gpus`` and ``cpus`` of each. Caps such as nvme_max are for each replica. A conversation that comes to another replica
is prefilled there again: kept sessions are not shared. Clients that call the cluster by another name than localhost
need ``host=0.0.0.0``, and then an api_key.
"""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

_RESOURCES = (("replicas", "1"), ("gpus", "0"), ("cpus", "1"))


def build_app(arguments: Mapping[str, str]) -> Application:
    """What ``serve run`` and ``serve deploy`` call."""
    given = dict(arguments)
    replicas, gpus, cpus = (float(given.pop(name, default)) for name, default in _RESOURCES)
    deployment = serve.deployment(serve.ingress(lambda: make_engine(given))())
    resources = {"num_gpus": gpus, "num_cpus": cpus}
    queue = int(given.get("max_queue", 64)) + int(given.get("max_running", 64))
    options = deployment.options(
        name="kvoffload", num_replicas=int(replicas), max_ongoing_requests=queue, ray_actor_options=resources
    )
    return options.bind()


def make_engine(given: Mapping[str, Any]) -> Any:
    """The application of one replica, with a model of its own."""
    from rich.console import Console

    from kvoffload.models.catalog import load_model
    from kvoffload.runtime.command import check_machine
    from kvoffload.runtime.terminal import ProgressView
    from kvoffload.server.app import make_app
    from kvoffload.server.command import ServeSettings, build
    from kvoffload.settings import load_settings_of

    settings = load_settings_of(ServeSettings, given)
    source, device = check_machine(settings, ProgressView(Console(stderr=True), quiet=settings.quiet))
    loaded = load_model(source, dtype=settings.dtype, device=device)
    return make_app(build(loaded, settings))
