"""``kvoffload session``: flags, no logic."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvoffload import flags

app = typer.Typer(help="Sessions on disk: list, inspect, verify, move and remove.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(metavar="FILE.kvo", show_default=False)]
Files = Annotated[list[Path], typer.Argument(metavar="FILE.kvo...", show_default=False)]


@app.command("ls")
def ls(folder: Annotated[Path, typer.Argument(metavar="DIR")] = Path("."), json: flags.Json = False) -> None:
    """List the sessions in a folder."""
    from kvoffload.runtime import session_command

    raise typer.Exit(session_command.run_ls(folder, sys.stdout, as_json=json))


@app.command()
def inspect(file: File, json: flags.Json = False) -> None:
    """Say what a session is of, without reading its pages."""
    from kvoffload.runtime import session_command

    raise typer.Exit(session_command.run_inspect(file, sys.stdout, as_json=json))


@app.command()
def verify(files: Files, json: flags.Json = False) -> None:
    """Read and check every byte; exit code 4 if anything is damaged."""
    from kvoffload.runtime import session_command

    raise typer.Exit(session_command.run_verify(files, sys.stdout, as_json=json))


@app.command()
def rm(files: Files) -> None:
    """Delete sessions; forks keep what they share with them."""
    from kvoffload.runtime import session_command

    raise typer.Exit(session_command.run_rm(files, sys.stdout))


@app.command()
def fork(
    file: File, target: Annotated[Path, typer.Argument(metavar="NEW.kvo", show_default=False)],
    nvme_max: flags.NvmeMax = None, nvme_floor: flags.NvmeFloor = None,
) -> None:  # fmt: skip
    """Make a second session with the same past; no page is copied."""
    from kvoffload.runtime import session_command

    raise typer.Exit(session_command.run_fork(file, target, sys.stdout, _bounds(nvme_max, nvme_floor)))


@app.command()
def pin(files: Files) -> None:
    """Never delete sessions to make room (so it is for new ones)."""
    from kvoffload.runtime import session_command

    raise typer.Exit(session_command.run_pin(files, sys.stdout, pinned=True))


@app.command()
def unpin(files: Files) -> None:
    """Allow sessions to be deleted to make room. It is made where --nvme-max or the disk leaves none."""
    from kvoffload.runtime import session_command

    raise typer.Exit(session_command.run_pin(files, sys.stdout, pinned=False))


@app.command()
def export(
    file: File, out: Annotated[Path, typer.Argument(metavar="OUT.tar", show_default=False)],
    nvme_floor: flags.NvmeFloor = None,
) -> None:  # fmt: skip
    """Write a session to one file."""
    from kvoffload.runtime import session_command

    raise typer.Exit(session_command.run_export(file, out, sys.stdout, _bounds(None, nvme_floor)))


@app.command("import")
def import_(
    archive: Annotated[Path, typer.Argument(metavar="IN.tar", show_default=False)], file: File,
    nvme_max: flags.NvmeMax = None, nvme_floor: flags.NvmeFloor = None,
) -> None:  # fmt: skip
    """Make a session from an exported file, after checking every byte."""
    from kvoffload.runtime import session_command

    raise typer.Exit(session_command.run_import(archive, file, sys.stdout, _bounds(nvme_max, nvme_floor)))


@app.command()
def upgrade(files: Files, nvme_max: flags.NvmeMax = None, nvme_floor: flags.NvmeFloor = None) -> None:
    """Verify sessions and write them anew in one piece; there must be room for both. (One format so far: version 1.)"""
    from kvoffload.runtime import session_command

    raise typer.Exit(session_command.run_upgrade(files, sys.stdout, _bounds(nvme_max, nvme_floor)))


def _bounds(nvme_max: str | None, nvme_floor: str | None) -> Any:
    from kvoffload.settings import load_settings

    return load_settings({"nvme_max": nvme_max, "nvme_floor": nvme_floor}).runtime()
