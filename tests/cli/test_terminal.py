"""Progress and statistics as people see them."""

import io
from dataclasses import replace

from rich.console import Console

from kvoffload.models.progress import LoadProgress
from kvoffload.runtime.events import Progress
from kvoffload.runtime.stats import Stats
from kvoffload.runtime.terminal import ProgressView, statistics_line


def test_bars_are_drawn_on_a_terminal_and_gone_after_it() -> None:
    drawn = io.StringIO()
    view = ProgressView(Console(file=drawn, force_terminal=True, width=100, highlight=False), quiet=False)
    with view.showing():
        view.load(LoadProgress("downloading", 5 << 20, 10 << 20))
        view.load(LoadProgress("downloading", 10 << 20, 10 << 20))
        view.prefill(Progress(512, 1024, 3 << 20))
        view.prefill(Progress(1024, 1024, 6 << 20))
    view.load(LoadProgress("converting", 1, 3))
    assert "10 MiB of 10 MiB" in drawn.getvalue()
    assert "prefill 1,024/1,024 tok, 6 MiB moved\n" in drawn.getvalue()


def test_the_statistics_are_one_line_and_leave_out_what_was_not_measured() -> None:
    nothing = {"cpu": 0, "nvme": 0}
    unmeasured = Stats(
        prompt_tokens=1234, new_tokens=1, ttft_s=None, tpot_ms=None, budget_tokens=None, read_tokens_per_step=None,
        read_share=None, charged_tokens_per_step=None, charged_share=None, bytes_read=nothing,
        decode_bytes_read=nothing, refresh_bytes_read=nothing, bytes_written=nothing, resident_bytes=2048,
        index_host_bytes=0, completion_mass=None, hit_rate=None, gate_abstain_share=None,
    )  # fmt: skip
    assert statistics_line(unmeasured) == "1,234 prompt tok · 1 tok · resident 2 KiB"
    gated = statistics_line(replace(unmeasured, gate_abstain_share=0.25))
    assert gated == "1,234 prompt tok · 1 tok · 25% of heads abstain · resident 2 KiB"
