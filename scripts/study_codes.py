"""Codes of keys that were tried beside the product's own, as indexes that keep what they would restore."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvoffload.buffers import Growing
from kvoffload.index.base import KeyIndex, Padding
from kvoffload.values import KeySample, Pages

Restore = Callable[[Tensor, int], Tensor]
"""Keys fp32 [rows, n, D] of the tokens from a number on, as they come back."""

_HALF_NORMAL = {1: (0.7979,), 2: (0.4528, 1.510)}


@dataclass(frozen=True)
class Code:
    """``fit`` sees a sample; ``n_bytes`` of a token at head size D."""

    fit: Callable[[KeySample], Restore]
    n_bytes: Callable[[int], float]


class StudyIndex(KeyIndex):
    """Restored keys in fp32; ``index_bytes`` is what the code would take."""

    def __init__(self, code: Code, device: torch.device) -> None:
        self._code, self.device = code, device
        self.reset()

    def reset(self, sample: KeySample | None = None) -> None:
        self._restored, self._padding, self.n_tokens = Growing(), Padding(), 0
        self._restore = None if sample is None else self._code.fit(sample)

    def absorb(self, pages: Pages) -> None:
        assert self._restore is not None, "a study's contexts are long enough for a sample"
        self._padding.absorb(pages)
        keys = pages.keys.flatten(1, 2).float()
        self._restored.append(self._restore(keys, self.n_tokens))
        self.n_tokens += keys.shape[1]

    def logits(self, query: Tensor) -> Tensor:
        return self._padding.mask(query @ self._restored.view.mT)

    def keys(self, start: int, stop: int) -> Tensor:
        return self._restored.view[:, start:stop]

    @property
    def index_bytes(self) -> int:
        rows, n_tokens, size = self._restored.view.shape
        return int(rows * n_tokens * self._code.n_bytes(size))


def rotated(bits: int) -> Code:
    """A random rotation, then every channel at the levels of a normal variable, with one scale a token (as QuaRot and
    TurboQuant do)."""

    def fit(sample: KeySample) -> Restore:
        mean, turn = sample.moments()[0][:, None], _rotation(sample.keys)
        levels = torch.tensor(_HALF_NORMAL[bits], device=turn.device)
        levels = torch.cat([-levels.flip(0), levels])

        def restore(keys: Tensor, first: int) -> Tensor:
            turned = (keys - mean) @ turn
            scale = turned.square().mean(-1, keepdim=True).sqrt().half().float().clamp_min(1e-6)
            codes = torch.bucketize(turned / scale, (levels[1:] + levels[:-1]) / 2)
            return levels[codes] * scale @ turn.T + mean

        return restore

    return Code(fit, lambda size: size * bits / 8 + 2)


def rabitq(bits: int) -> Code:
    """RaBitQ (arXiv:2405.12497; more bits: 2409.09913): codes of the rotated, centred and normalised key, and the
    estimator <k, q> = <c, q> + |k - c| <x, q> / <x, o>, which has no bias."""

    def fit(sample: KeySample) -> Restore:
        centre, turn = sample.moments()[0][:, None], _rotation(sample.keys)

        def restore(keys: Tensor, first: int) -> Tensor:
            turned = (keys - centre) @ turn
            norm = turned.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            unit = turned / norm
            code = _grid(unit, bits)
            factor = norm / (code * unit).sum(-1, keepdim=True).clamp_min(1e-6)
            return code * factor.half().float() @ turn.T + centre

        return restore

    return Code(fit, lambda size: size * bits / 8 + 2)


def _grid(unit: Tensor, bits: int) -> Tensor:
    """The code of the largest cosine, over a few steps of the grid."""
    if bits == 1:
        return unit.sign()
    best = unit.sign()
    best_cosine = _cosine(best, unit)
    top = 2 ** (bits - 1) - 0.5
    for scale in torch.linspace(0.5, 2.5, 9, device=unit.device):
        code = ((unit * unit.shape[-1] ** 0.5 / scale).floor() + 0.5).clamp(-top, top)
        cosine = _cosine(code, unit)
        best = torch.where(cosine > best_cosine, code, best)
        best_cosine = torch.maximum(cosine, best_cosine)
    return best


def _cosine(code: Tensor, unit: Tensor) -> Tensor:
    return (code * unit).sum(-1, keepdim=True) / code.norm(dim=-1, keepdim=True)


def product(width: int, *, in_query_metric: bool) -> Code:
    """Product codes: 256 centroids for every ``width`` channels (8 / ``width`` bits a channel), by k-means on the
    sample; in the metric of the queries channels are first turned by a root of their moment."""

    def fit(sample: KeySample) -> Restore:
        mean = sample.moments()[0][:, None]
        size = mean.shape[-1]
        moment = sample.query_moment.double()
        eye = torch.eye(size, dtype=moment.dtype, device=moment.device)
        moment = 0.7 * moment + 0.3 * moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye
        root = torch.linalg.cholesky(moment) if in_query_metric else eye.expand_as(moment)
        turn, back = root.float(), torch.linalg.inv(root).float()
        book = _k_means(((sample.keys.float() - mean) @ turn).unflatten(-1, (-1, width)).transpose(1, 2))

        def restore(keys: Tensor, first: int) -> Tensor:
            parts = ((keys - mean) @ turn).unflatten(-1, (-1, width)).transpose(1, 2)  # [rows, parts, n, width]
            nearest = torch.cdist(parts, book).argmin(-1)
            found = book.gather(2, nearest[..., None].expand(-1, -1, -1, width))
            return found.transpose(1, 2).flatten(-2) @ back + mean

        return restore

    return Code(fit, lambda size: size / width)  # and a codebook of 512 * D bytes a row


def before_rotary(bits: int, theta: float, n_sinks: int) -> Code:
    """A channel's mean and levels of a normal variable (as ``rotated``, without a rotation) on keys whose rotary
    embedding is undone; restored keys have it again."""

    def fit(sample: KeySample) -> Restore:
        levels = torch.tensor(_HALF_NORMAL[bits], device=sample.keys.device)
        levels = torch.cat([-levels.flip(0), levels])
        state: list[tuple[Tensor, Tensor]] = []

        def restore(keys: Tensor, first: int) -> Tensor:
            positions = torch.arange(first, first + keys.shape[1], device=keys.device) + n_sinks
            plain = _turn(keys, positions, theta, -1)
            if not state:  # the sample's positions are not known: the first block stands for the rest
                mean = plain.mean(1, keepdim=True)
                state.append((mean, (plain - mean).square().mean(1, keepdim=True).sqrt()))
            mean, scale = state[0]
            codes = torch.bucketize((plain - mean) / scale, (levels[1:] + levels[:-1]) / 2)
            return _turn(levels[codes] * scale + mean, positions, theta, 1)

        return restore

    return Code(fit, lambda size: size * bits / 8)


def _turn(keys: Tensor, positions: Tensor, theta: float, sign: int) -> Tensor:
    half = keys.shape[-1] // 2
    angles = sign * positions[:, None] * theta ** -(torch.arange(half, device=keys.device) / half)
    cos, sin = angles.cos(), angles.sin()
    a, b = keys.split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _rotation(keys: Tensor) -> Tensor:
    size = keys.shape[-1]
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise).Q.to(keys.device)


def _k_means(points: Tensor, n: int = 256, steps: int = 12) -> Tensor:
    """Centroids [..., n, width] of points [..., N, width]."""
    picked = torch.linspace(0, points.shape[-2] - 1, n, device=points.device).long()
    centroids = points[..., picked, :].clone()
    for _ in range(steps):
        nearest = torch.cdist(points, centroids).argmin(-1, keepdim=True)
        counts = torch.zeros_like(centroids[..., :1]).scatter_add_(-2, nearest, torch.ones_like(points[..., :1]))
        sums = torch.zeros_like(centroids).scatter_add_(-2, nearest.expand_as(points), points)
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
    return centroids
