"""Which twin runs: Triton only on CUDA, and only where its check has passed on a GPU."""

import pytest
import torch
from kvoffload_kernels import dispatch


class OnCuda:
    is_cuda = True


def test_only_verified_kernels_are_used_and_only_on_cuda(monkeypatch):
    monkeypatch.setattr(dispatch, "VERIFIED", frozenset({"merge"}))
    assert dispatch._verified("merge", OnCuda())
    assert not dispatch._verified("sparse_decode", OnCuda())
    assert not dispatch._verified("merge", torch.zeros(1))


@pytest.mark.parametrize("folder", sorted(dispatch.VERIFIED | {"merge", "completion", "sparse_decode"}))
def test_the_names_are_those_of_folders_with_a_kernel(folder):
    pytest.importorskip("triton")
    __import__(f"kvoffload_kernels.{folder}.kernel")


def test_on_the_cpu_partials_are_merged_by_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "VERIFIED", frozenset({"merge"}))
    monkeypatch.setattr(dispatch.merge, "merge_parts", lambda outputs, lses: "reference")
    assert dispatch.merge_parts([torch.zeros(1, 1)], [torch.zeros(1)]) == "reference"
