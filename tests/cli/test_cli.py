"""The command line: help and imports, exit codes, one line for bad input, precedence, and real runs of ``tiny``."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from kvoffload import __version__, cli
from kvoffload.config import VARIANTS
from kvoffload.errors import KvoffloadError
from kvoffload.models import catalog
from kvoffload.runtime import command
from kvoffload.runtime.doctor import FEATURES
from kvoffload.runtime.session import Session
from kvoffload.settings import Settings, load_settings

HEAVY = ("torch", "transformers", "pydantic", "pydantic_settings", "numpy", "rich")
TINY = ["generate", "--model", "tiny", "--max-new-tokens", "3"]
KEYS = {
    "text", "prompt_tokens", "new_tokens", "ttft_s", "tpot_ms", "budget_tokens", "read_tokens_per_step", "read_share",
    "charged_tokens_per_step", "charged_share", "bytes_read", "bytes_written", "resident_bytes", "completion_mass",
    "hit_rate", "model", "config",
}  # fmt: skip


@pytest.mark.parametrize("module", ["kvoffload", "kvoffload.cli", "kvoffload.models.catalog"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    script = f"import {module}, sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


@pytest.mark.parametrize(
    "arguments",
    ["--help", "generate --help", "plan -h", "calibrate --help", "sweep --help", "bench decode --help", "--version"],
)
def test_help_loads_no_torch(arguments: str) -> None:
    script = f"import sys; from kvoffload.cli import run; assert run({arguments.split()!r}) == 0; assert not " + (
        "{'torch', 'transformers', 'pydantic_settings'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)


def test_the_version_is_printed(kvoffload: Any) -> None:
    assert kvoffload("--version").out == f"kvoffload {__version__}\n"


def test_no_command_shows_the_commands(kvoffload: Any) -> None:
    ran = kvoffload()
    assert ran.code == 2
    assert all(name in ran.out for name in ("generate", "plan", "env"))


def options(name: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(cli.app)
    return {option.name: option for option in group.commands[name].params}


def test_every_setting_has_a_flag_whose_default_is_none() -> None:
    flags = options("generate")
    assert set(Settings.model_fields) - set(flags) == {"output"}
    assert all(flags[name].default is None for name in Settings.model_fields if name != "output")


def test_the_defaults_that_help_tells_are_the_real_ones() -> None:
    flags, defaults = options("generate"), Settings().merged()
    words = {True: "on", False: "off"}
    for name, default in defaults.items():
        told = flags[name].show_default if name in flags else False
        if told and name not in ("budget", "selector", "completion", "nvme_dir", "seed"):
            number = f"{default:g}" if isinstance(default, float) else str(default)
            assert told == (words[default] if isinstance(default, bool) else number)
    assert flags["selector"].show_default == defaults["selector"]["kind"]
    others = load_settings({"selector": "bounds"}).merged()["completion"]
    told = [one["kind"] for one in (*defaults["completion"], *others)]
    assert flags["completion"].show_default == "{}, or {} with the other selectors".format(*told)
    assert flags["budget"].show_default.startswith(defaults["budget"])


def test_help_names_every_variant_and_feature() -> None:
    flags = options("generate")
    for slot, variants in VARIANTS.items():
        listed = flags[slot].help.split(": ")[1].split(";")[0]
        assert set(re.split(r", | or ", listed)) == set(variants)
    assert all(feature in options("env")["require"].help for feature in FEATURES)


def kinds(slot: str) -> str:
    return ", ".join(VARIANTS[slot])


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ("fly", 2, "No such command 'fly'"),
        ("generate --colour red", 2, "No such option: --colour"),
        ("generate --sinks many", 2, "Invalid value for '--sinks'"),
        ("generate -p x", 2, "give one with --model; accepted: smollm2-135m, llama-3.1-8b-shape"),
        ("generate -p x --model gpt5", 2, "'gpt5' is unknown; accepted: smollm2-135m, llama-3.1-8b-shape"),
        ("generate -p x --model ./none/at/all", 2, "'./none/at/all' is unknown; accepted: smollm2-135m"),
        ("generate --model tiny", 2, "the prompt is empty"),
        ("generate --model tiny --prompt-file /none", 2, "prompt file '/none' cannot be read: No such file"),
        ("generate --model tiny -p x --selector best", 2, f"'best' is unknown; accepted: {kinds('selector')}\n"),
        ("generate --model tiny -p x --completion best", 2, f"'best' is unknown; accepted: {kinds('completion')}\n"),
        ("generate --model tiny -p x --selector bounds --completion regression", 2, "with one: quantized, transform\n"),
        ("generate --model tiny -p x --layer-budgets /none", 2, "layer_budgets: file '/none' is not there"),
        ("generate --model tiny -p x --layer-budgets README.md", 2, "layer_budgets: file must be made by kvoffload"),
        ("generate --model tiny -p x --completion phi+none", 2, "give one, or let --gate choose"),
        (
            "generate --model tiny -p x --policy best",
            2,
            "policy: 'best' is unknown; accepted: prhs, hshare, tokenselect",
        ),
        ("generate --model tiny -p x --policy keepkv", 2, "'keepkv' is a completion: give --completion keepkv;"),
        ("generate --model tiny -p x --policy chelsea", 2, "is a completion: give --completion chelsea; accepted:"),
        ("generate --model tiny -p x --selector retro", 2, "selector: 'retro' is a policy: give --policy retro;"),
        ("generate --model tiny -p x --policy prhs:blok=2", 2, "policy.prhs.blok: unknown name; accepted: block, tau"),
        ("generate --model tiny -p x --policy retro:window=65", 2, "policy.retro.window: 65: input should be less"),
        ("generate --model tiny -p x --policy resa:every=65", 2, "every=65 must not exceed recent=64"),
        ("generate --model tiny -p x --max-dropped-mass 2", 2, "max_dropped_mass: '2'"),
        ("generate --model tiny -p x --max-dropped-mass 0.1 --completion none", 2, "max_dropped_mass: 0.1 needs one"),
        ("generate --model tiny -p x --audit 0", 2, "audit: '0'"),
        ("generate --model tiny -p x --offload tape", 2, "'tape' is unknown; accepted: none, cpu, nvme"),
        ("generate --model tiny -p x --budget 16M", 2, "'16M' is not a budget: give a share of the context (5%)"),
        ("generate --model tiny -p x --budget 120%", 2, "'120%' is more than 100%"),
        ("generate --model tiny -p x --nvme-max lots", 2, "'lots' is not a size such as 512MiB"),
        ("generate --model tiny -p x --num-beams 2", 2, "num_beams: 2 is not supported"),
        ("generate --model tiny -p x --page-size 5", 2, "page_size: 5 is not a power of two"),
        ("generate --model tiny -p x --device cuda:99", 2, "device 'cuda:99' is not there"),
        ("generate --model tiny -p x --config /none.toml", 2, "config file '/none.toml' cannot be read"),
        ("generate --model tiny -p x --cpu-max 1K", 3, "--cpu-max allows 1 KiB"),
        ("generate --model tiny -p x --offload nvme --nvme-max 1K", 3, "--nvme-max allows 1 KiB"),
        ("generate --model tiny -p x --offload nvme --nvme-dir /proc/none", 3, "cannot be written"),
        ("generate --model tiny -p x --max-new-tokens 99999999999", 3, "of host memory"),
        ("plan --model tiny --context lots", 2, "context: 'lots' is not a number of tokens"),
        ("plan --model tiny --batch 0", 2, "Invalid value for '--batch'"),
        ("env --require tape", 2, "'tape' is unknown; accepted: cuda"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code_before_weights_load(
    kvoffload: Any, no_weights: None, arguments: str, code: int, told: str
) -> None:
    ran = kvoffload(*arguments.split())
    assert ran.code == code
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert told in ran.err
    assert ran.out == ""


def test_an_engine_that_does_not_work_here_is_refused(
    kvoffload: Any, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "why_not", lambda name, folder: "seccomp")
    ran = kvoffload(*TINY, "-p", "x", "--offload", "nvme", "--io-engine", "uring")
    assert (ran.code, ran.err) == (2, "error: io_engine: 'uring' cannot be used here: seccomp\n")


def test_a_prompt_file_that_is_no_text_is_refused(kvoffload: Any, no_weights: None, tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    ran = kvoffload(*TINY, "--prompt-file", str(tmp_path / "picture"))
    assert ran.code == 2
    assert "is not UTF-8 text" in ran.err


def test_the_merged_settings_follow_file_environment_and_flags(
    kvoffload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('budget = "1%"\nrecent = 32\nsinks = 8\nmodel = "tiny"\n')
    monkeypatch.setenv("KVOFFLOAD_BUDGET", "2%")
    monkeypatch.setenv("KVOFFLOAD_RECENT", "48")
    monkeypatch.setenv("KVOFFLOAD_STOP", "END")
    flags = ("generate", "--config", str(file), "--budget", "3%", "--print-config")
    told = tomllib.loads(kvoffload(*flags).out)
    assert (told["budget"], told["recent"], told["sinks"], told["model"]) == ("3%", 48, 8, "tiny")
    assert told["stop"] == ["END"]
    ran = kvoffload(*flags, "--json", "--stop", "a", "--stop", "b")
    assert ran.code == 0
    assert json.loads(ran.out)["stop"] == ["a", "b"]


@pytest.mark.parametrize("policy", ["prhs", "hshare", "retro:window=3", "resa:every=2", "refresh", "tokenselect"])
def test_every_policy_generates_and_is_told_in_the_result(kvoffload: Any, policy: str) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 12
    flags = ("--max-dropped-mass", "0.2", "--completion", "pages", "--audit", "1", "--json")
    ran = kvoffload(*TINY, "-p", prompt, "--policy", policy, *flags)
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["config"]["policy"][0]["kind"] == policy.partition(":")[0]
    assert 0 <= told["dropped_mass"] <= 1
    assert (told["max_dropped_mass"], told["new_tokens"]) == (0.2, 3)
    assert 0 <= told["dropped_mass_held"] <= 1


@pytest.mark.parametrize(("cap", "n_warnings"), [("1%", 1), ("100%", 0)])
def test_a_dropped_mass_that_the_cap_kept_from_its_target_is_one_warning(
    kvoffload: Any, cap: str, n_warnings: int
) -> None:
    flags = ("--max-dropped-mass", "0.001", "--dropped-mass-cap", cap, "--budget", "1%", "--json", "--quiet")
    ran = kvoffload(*TINY, "-p", "The quick brown fox jumps over the lazy dog. " * 12, *flags)
    assert ran.code == 0, ran.err
    share = json.loads(ran.out)["dropped_mass_capped"]
    told = f"warning: dropped mass target not reached in {share:.1%} of heads and steps: raise --dropped-mass-cap\n"
    assert ran.err == told * n_warnings
    assert (share > 0) == bool(n_warnings)


def test_policies_have_sections_in_a_file(kvoffload: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'max_dropped_mass = 0.05\n[[policy]]\nkind = "prhs"\nblock = 4\n[[policy]]\nkind = "retro"\nwindow = 2\n'
    )
    told = tomllib.loads(kvoffload("generate", "--config", str(file), "--print-config").out)
    assert [(p["kind"], p.get("block"), p.get("window")) for p in told["policy"]] == [
        ("prhs", 4, None),
        ("retro", None, 2),
    ]
    assert told["max_dropped_mass"] == 0.05


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_json_is_the_only_line_of_stdout_and_has_every_key(kvoffload: Any, offload: str, tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    prompt = "The quick brown fox jumps over the lazy dog. " * 12
    ran = kvoffload(*TINY, "-p", prompt, "--offload", offload, "--nvme-dir", str(tmp_path / "kv"), "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert ran.out.count("\n") == 1
    assert set(told) >= KEYS
    assert (told["model"], told["new_tokens"], told["prompt_tokens"]) == ("tiny", 3, len(prompt))
    assert told["config"]["offload"] == offload
    assert told["config"]["budget"] == ("100%" if offload == "none" else "5%")
    assert list((tmp_path / "kv").iterdir()) == []


def test_text_goes_to_stdout_and_the_rest_to_stderr_without_escape_codes(kvoffload: Any) -> None:
    text = json.loads(kvoffload(*TINY, "-p", "hello", "--json").out)["text"]
    ran = kvoffload(*TINY, "-p", "hello")
    assert ran.out == text if text.endswith("\n") else text + "\n"
    assert "prefill 5/5 tok" in ran.err
    assert "5 prompt tok" in ran.err
    assert "\x1b" not in ran.err + ran.out


def test_quiet_says_nothing_on_stderr(kvoffload: Any) -> None:
    assert kvoffload(*TINY, "-p", "hello", "--quiet").err == ""


def prompt_of(*flags: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The prompt's text as the session gets it."""
    seen: list[str] = []

    def stop(self: Session, prompt: list[int]) -> None:
        seen.append(self._tokenizer.decode(prompt))
        raise KvoffloadError("enough")

    monkeypatch.setattr(Session, "begin_prefill", stop)
    assert cli.run([*TINY, *flags]) == 1
    return seen[0]


def test_the_prompt_follows_the_files_text_after_a_blank_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.txt").write_text("Once.\nTwice.\n\n")
    file = ("--prompt-file", str(tmp_path / "book.txt"))
    assert prompt_of(*file, "-p", "Who?", monkeypatch=monkeypatch) == "Once.\nTwice.\n\nWho?"
    assert prompt_of(*file, monkeypatch=monkeypatch) == "Once.\nTwice."


def test_a_dash_reads_stdin_and_a_system_message_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from stdin\n")))
    assert prompt_of("--prompt-file", "-", "--system", "Be kind.", monkeypatch=monkeypatch) == "Be kind.\n\nfrom stdin"


def test_the_chat_template_is_used_where_there_is_one_and_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = catalog.byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    monkeypatch.setattr(command, "load_tokenizer", lambda *_: tokenizer)
    flags = ("-p", "Hi", "--system", "Kind")
    assert prompt_of(*flags, monkeypatch=monkeypatch) == "<system>Kind<user>Hi<answer>"
    assert prompt_of(*flags, "--no-chat-template", monkeypatch=monkeypatch) == "Kind\n\nHi"


def test_a_prompt_beyond_the_models_context_is_a_warning_or_refused(
    kvoffload: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("x" * 8193)
    flags = ("--prompt-file", str(tmp_path / "long.txt"))
    ran = kvoffload(*TINY, *flags, "--strict-context")
    assert ran.code == 2
    assert "the prompt has 8,193 tokens and the model was made for 8,192" in ran.err
    monkeypatch.setattr(Session, "begin_prefill", lambda *_, **__: (_ for _ in ()).throw(KvoffloadError("enough")))
    ran = kvoffload(*TINY, *flags, "--quiet")
    assert ran.err.startswith("warning: the prompt has 8,193 tokens")
    assert ran.err.count("\n") == 2


def raising(error: BaseException) -> Any:
    def stream(self: Session, sampling: Any) -> Any:
        raise error
        yield

    return stream


@pytest.mark.parametrize(("name", "code"), [("CapacityError", 3), ("IntegrityError", 4), ("UnavailableError", 2)])
def test_storage_errors_have_exit_codes_and_leave_no_files(
    kvoffload: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, code: int
) -> None:
    from kvoffload_storage import errors

    monkeypatch.setattr(Session, "stream", raising(getattr(errors, name)("page 3\nis bad")))
    ran = kvoffload(*TINY, "-p", "x", "--offload", "nvme", "--nvme-dir", str(tmp_path), "--quiet")
    assert (ran.code, ran.err) == (code, "error: page 3 is bad\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.EMFILE, 3), (errno.ENOSPC, 3), (errno.EIO, 1)])
def test_what_the_system_refuses_has_the_exit_code_of_its_reason(
    kvoffload: Any, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    monkeypatch.setattr(Session, "stream", raising(OSError(number, os.strerror(number), "some/file")))
    ran = kvoffload(*TINY, "-p", "x", "--quiet")
    assert ran.code == code
    assert "some/file" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [["generate", "--help"], ["generate", "--model", "tiny", "--max-new-tokens", "2", "-p", "a", "-q"]],
)
def test_output_that_finds_no_room_is_told_as_such(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "kvoffload", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "error: [Errno 28] standard output cannot be written: No space left on device\n"


def test_ctrl_c_exits_with_130_after_the_session_is_closed(
    kvoffload: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Session, "stream", raising(KeyboardInterrupt()))
    ran = kvoffload(*TINY, "-p", "x", "--offload", "nvme", "--nvme-dir", str(tmp_path))
    assert ran.code == 130
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_main_exits_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kvoffload", "--version"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0


def test_a_polite_kill_removes_the_page_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvoffload", "generate", "--model", "tiny", "--offload", "nvme", "-p", "hi" * 100]
    command += ["--nvme-dir", str(tmp_path), "--max-new-tokens", "8000", "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # it generates: the files are there
        assert list(tmp_path.iterdir())
        process.terminate()
        process.stdout.read()
        assert process.wait() == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags", [["--temperature", "1e-40"], ["--seed", str(2**70)], ["--completion", "phi:file=pyproject.toml"]]
)
def test_numbers_and_files_that_cannot_be_used_are_refused_in_one_line(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["generate", "--model", "tiny", "-p", "hi", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
