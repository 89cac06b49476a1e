"""Names of models, shapes, folders and .gguf files. Nothing here downloads."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from kvoffload.errors import OutOfRoomError, UnsupportedModelError, UsageError
from kvoffload.models import demo
from kvoffload.models.catalog import (
    BUILT_IN,
    ModelSource,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve,
    weight_bytes,
)
from kvoffload.models.progress import LoadProgress, ignore

CPU = torch.device("cpu")


def write_gguf(path: Path) -> None:
    """A llama of one layer whose tokenizer knows two letters."""
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(4)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<end>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd": (4, 32), "output_norm": (32,), "output": (4, 32), "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (32, 32), "blk.0.ffn_up": (32, 32), "blk.0.ffn_down": (32, 32),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_built_in_names_resolve_without_the_network() -> None:
    assert [resolve(name).kind for name in BUILT_IN] == ["demo", "shape", "shape", "shape"]


def test_paths_and_hub_names_resolve_by_their_form(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.gguf").write_text("")
    assert resolve(str(tmp_path)) == ModelSource("folder", str(tmp_path), tmp_path)
    assert resolve(str(tmp_path / "m.gguf")).kind == "gguf"
    hub = resolve("Qwen/Qwen3-0.6B", revision="main", trust_remote_code=True)
    assert hub.kind == "hub"
    assert hub.arguments() == ("Qwen/Qwen3-0.6B", {"trust_remote_code": True, "revision": "main"})


@pytest.mark.parametrize("name", ["gpt2", "smollm", "./nothing/here", "a/b/c", "nothing/here.gguf", "~/no/model"])
def test_a_name_that_can_mean_nothing_lists_what_is_accepted(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name!r} is unknown") as refused:
        resolve(name)
    assert all(built_in in str(refused.value) for built_in in (*BUILT_IN, ".gguf", "folder", "hub name"))


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither a .gguf file nor a folder with a config.json"):
        resolve(str(tmp_path))


def test_the_demo_config_is_known_without_a_download() -> None:
    config = load_config(resolve("smollm2-135m"))
    assert weight_bytes(config, torch.bfloat16) == 269_030_016
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (30, 3, 64)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.1-8b-shape", 8.030), ("qwen2.5-0.5b-shape", 0.494), ("tiny", 0.000183)]
)
def test_shapes_have_the_sizes_of_their_models(name: str, billions: float) -> None:
    n_bytes = weight_bytes(load_config(resolve(name)), torch.bfloat16)
    assert n_bytes / 2e9 == pytest.approx(billions, rel=2e-3)


def test_the_tiny_shape_is_the_same_every_time_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (load_model(resolve("tiny"), dtype="auto", device="auto").model for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.dtype == torch.float32
    assert not first.training


def test_the_attention_of_tiny_is_not_flat() -> None:
    model = load_model(resolve("tiny"), dtype="float32", device="cpu").model
    model.set_attn_implementation("eager")
    ids = torch.arange(64)[None] * 3 % 256
    weights = torch.stack(model(ids, output_attentions=True).attentions)[..., -1, :]
    assert weights.amax(-1).mean() > 3 / 64


def test_the_byte_tokenizer_gives_every_text_back() -> None:
    tokenizer = load_tokenizer(resolve("tiny"))
    text = "Hällo  wörld \n\t 你好 🙂 it's"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id == 256
    assert tokenizer.eos_token_id is None
    assert tokenizer.chat_template is None


def test_a_gguf_file_loads_and_converts_to_an_equal_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "m.gguf", tmp_path / "folder"
    write_gguf(file)
    told: list[LoadProgress] = []
    direct = load_model(resolve(str(file)), dtype=torch.bfloat16, device=CPU, on_progress=told.append)
    assert told[-1] == LoadProgress(f"loading {file}", 11, 12)
    demo.convert(file, folder, ignore)
    converted = load_model(resolve(str(folder)), dtype=torch.bfloat16, device=CPU)
    ids = torch.tensor([[1, 2, 1]])
    assert torch.equal(direct.model(ids).logits, converted.model(ids).logits)
    assert converted.tokenizer("aba").input_ids == [3, 1]
    assert not hasattr(converted.config, "quantization_config")
    assert capfd.readouterr().err == ""


def test_a_file_that_is_no_gguf_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"m.gguf' cannot be loaded"):
        load_config(resolve(str(tmp_path / "m.gguf")))


def test_a_model_type_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UnsupportedModelError, match="nonesuch"):
        load_config(resolve(str(tmp_path)))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    load_config(resolve("tiny")).save_pretrained(tmp_path)
    load_tokenizer(resolve("tiny")).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(resolve(str(tmp_path)), dtype="auto", device="cpu")


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tiny = load_model(resolve("tiny"), dtype="auto", device="cpu")
    tiny.config.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items() if "layers.2.mlp" not in name}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 3 weights, the first is 'model.layers.2.mlp.down_proj"):
        load_model(resolve(str(tmp_path)), dtype="auto", device="cpu")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(UsageError, match="'nobody/nothing' cannot be loaded: We couldn't connect to the hub; accepted"):
        load_config(resolve("nobody/nothing"))


def test_weights_that_do_not_fit_are_out_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr("kvoffload.models.catalog.shape_model", full)
    with pytest.raises(OutOfRoomError, match=r"'tiny' does not fit on the device: CUDA out of memory$"):
        load_model(resolve("tiny"), dtype="auto", device="cpu")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="device 'cuda:99' is not there"):
        pick_device("cuda:99")


def test_dtype_auto_is_fp32_on_a_cpu_and_the_checkpoints_elsewhere() -> None:
    config = load_config(resolve("llama-3.1-8b-shape"))
    assert pick_dtype("auto", config, CPU) == torch.float32
    assert pick_dtype("auto", config, torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float16", config, CPU) == torch.float16
    assert pick_dtype(torch.float16, config, CPU) == torch.float16
