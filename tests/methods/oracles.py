"""The rivals' rules once more, slowly: one head, one query block, one block at a time, in fp64 numpy.

Every function takes the queries (Sq, D) and keys (Sk, D) of one head, `Sees` of them and the method, and returns the
selected blocks of the method's own size as a bool array (query blocks, key blocks).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bsfa.methods import FlashPrefill, FlexPrefill, SpargeAttn, SpargeAttnTopK, XAttention
from bsfa.patterns import A_SHAPE, BLOCK_SPARSE, Pattern


@dataclass(frozen=True)
class Sees:
    """Which entries a causal call sees, entry by entry."""

    queries: int
    keys: int
    left: int = -1

    @property
    def offset(self) -> int:
        return self.keys - self.queries

    def entry(self, row: int, key: int) -> bool:
        position = self.offset + row
        return key <= position and (self.left < 0 or key >= position - self.left)

    def entries(self) -> np.ndarray:
        position, key = self.offset + np.arange(self.queries)[:, None], np.arange(self.keys)
        return (key <= position) & ((self.left < 0) | (key >= position - self.left))

    def blocks(self, size_q: int, size_k: int) -> np.ndarray:
        """Which blocks have an entry that is seen."""
        entries = self.entries()
        return np.array(
            [
                [entries[i : i + size_q, j : j + size_k].any() for j in range(0, self.keys, size_k)]
                for i in range(0, self.queries, size_q)
            ]
        )


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def runs(length: int, size: int) -> Iterator[tuple[int, slice]]:
    for i in range(math.ceil(length / size)):
        yield i, slice(i * size, min((i + 1) * size, length))


def means(x: np.ndarray, size: int) -> np.ndarray:
    return np.array([x[run].mean(0) for _, run in runs(len(x), size)])


def attention(q: np.ndarray, k: np.ndarray, sees: Sees, rows: range) -> np.ndarray:
    out = np.zeros((len(rows), sees.keys))
    for n, row in enumerate(rows):
        seen = [key for key in range(sees.keys) if sees.entry(row, key)]
        out[n, seen] = softmax(k[seen] @ q[row] / math.sqrt(q.shape[1]))
    return out


def by_distance(weights: np.ndarray, rows: range) -> np.ndarray:
    total = np.zeros(weights.shape[1])
    for n, row in enumerate(rows):
        for key in range(row + 1):
            total[row - key] += weights[n, key]
    return total


def xattention(q: np.ndarray, k: np.ndarray, sees: Sees, method: XAttention) -> np.ndarray:
    stride = method.stride
    seen = sees.blocks(128, 128)
    keep = np.zeros_like(seen)
    scale = 1 / math.sqrt(q.shape[1]) / stride
    for i, rows in runs(len(q), 128):
        mass = np.zeros(seen.shape[1])
        for first in range(rows.start, rows.stop, stride):
            position = sees.offset + first
            groups, scores = [], []
            for start in range(0, len(k), stride):
                if start > position + stride - 1 or (0 <= sees.left < position - (start + stride - 1)):
                    continue
                pairs = [(first + stride - 1 - t, start + t) for t in range(stride)]
                scores.append(scale * sum(q[a] @ k[b] for a, b in pairs if a < len(q) and b < len(k)))
                groups.append(start // 128)
            for block, weight in zip(groups, softmax(np.array(scores)), strict=True):
                mass[block] += weight
        forced = {0} | {j for j in range(seen.shape[1]) if seen[i, j] and 128 * (j + 1) > sees.offset + rows.start}
        held = sum(mass[j] for j in forced)
        keep[i, list(forced)] = True
        for j in np.argsort(-mass):
            if j not in forced and held < method.threshold * mass.sum():
                keep[i, j] = True
                held += mass[j]
    return keep


def flashprefill(q: np.ndarray, k: np.ndarray, sees: Sees, method: FlashPrefill) -> np.ndarray:
    keys = means(k, 128)
    seen = sees.blocks(128, 128)
    keep = np.zeros_like(seen)
    for i, rows in runs(len(q), 128):
        score = np.zeros(len(keys))
        for j, key in enumerate(keys):
            last = 128 * j + 127
            after = [row for row in range(rows.start, rows.stop) if last <= sees.offset + row]
            after = [row for row in after if sees.left < 0 or last >= sees.offset + row - sees.left]
            score[j] = np.exp(q[after] @ key / math.sqrt(q.shape[1])).sum()
        diagonal = (sees.offset + rows.start) // 128
        for j in range(len(keys)):
            keep[i, j] = (
                score[j] >= method.alpha * score.max()
                or j < method.sink_blocks
                or j > diagonal - method.window_blocks
                or i >= len(seen) - method.last_full_blocks
            )
    return keep


def spargeattn(q: np.ndarray, k: np.ndarray, sees: Sees, method: SpargeAttn | SpargeAttnTopK) -> np.ndarray:
    k = k - k.mean(0)

    def odd(x: np.ndarray) -> bool:
        units = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return (units @ units.T).mean() <= method.similarity

    odd_q = [odd(q[run]) for _, run in runs(len(q), 128)]
    odd_k = [odd(k[run]) for _, run in runs(len(k), 64)]
    queries, keys = means(q, 128), means(k, 64)
    seen = sees.blocks(128, 64)
    keep = np.zeros_like(seen)
    for i, rows in runs(len(q), 128):
        plain = [j for j in range(len(keys)) if seen[i, j] and not odd_k[j]]
        if plain:
            mass = softmax(keys[plain] @ queries[i] / math.sqrt(q.shape[1]))
            ranked, held = np.argsort(-mass), 0.0
            for rank, n in enumerate(ranked):
                held += mass[n]
                if isinstance(method, SpargeAttnTopK):
                    chosen = rank < max(1, int(method.share * len(keys)))
                else:
                    chosen = held <= method.cdf or rank == 0
                keep[i, plain[n]] = chosen
        for j in range(len(keys)):
            keep[i, j] |= odd_k[j] or odd_q[i] or 64 * (j + 1) > sees.offset + rows.start
    return keep


def flexprefill(q: np.ndarray, k: np.ndarray, sees: Sees, method: FlexPrefill) -> np.ndarray:
    n = math.ceil(len(k) / 128)
    seen = sees.blocks(128, 128)
    keep = np.zeros_like(seen)
    rows = range(max(0, len(q) - 128), len(q))
    weights = attention(q, k, sees, rows)
    # A diagonal is named by the key at which it meets the last row.
    vertical, slash = weights.mean(0), by_distance(weights, rows)[::-1] / len(rows)
    columns, diagonals = ([x[run].sum() for _, run in runs(len(k), 128)] for x in (vertical, slash))

    looked_at = [j for j in range(n) if any(sees.entry(row, key) for row in rows for key in range(*span(j, len(k))))]
    guess = np.zeros(n)
    guess[looked_at] = softmax(means(k, 128)[looked_at] @ q[rows.start :].mean(0) / math.sqrt(q.shape[1]))

    def relative_entropy(p: np.ndarray, other: np.ndarray) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, other, strict=True) if a > 0)

    middle = (guess + columns) / 2
    divergence = math.sqrt(max(0, relative_entropy(guess, middle) / 2 + relative_entropy(columns, middle) / 2))
    aware = divergence < method.tau

    least = math.ceil(method.min_budget / 128)
    for mass, tokens, forced in ((columns, vertical, 0), (diagonals, slash, n - 1)):
        covered, count = np.cumsum(np.sort(tokens)[::-1]), 1
        count += sum(c <= method.gamma for c in covered)
        budget = least if aware else max(least, count // 128 + 1)
        order = sorted(range(n), key=lambda j: (j != forced, -mass[j]))[:budget]
        for j in order:
            if forced == 0:
                keep[:, j] = True
            else:
                for i in range(n - 1 - j, n):
                    keep[i, i - (n - 1 - j)] = True
    if aware:
        pooled = np.zeros_like(seen, dtype=float)
        for i, query in enumerate(means(q, 128)):
            some = [j for j in range(n) if seen[i, j]]
            pooled[i, some] = softmax(means(k, 128)[some] @ query / math.sqrt(q.shape[1]))
        held = 0.0
        for cell in np.argsort(-pooled, axis=None):
            held += pooled.flat[cell]
            keep.flat[cell] |= held <= method.gamma * n
    return keep


def span(block: int, length: int) -> tuple[int, int]:
    return 128 * block, min(128 * (block + 1), length)


def minference(q: np.ndarray, k: np.ndarray, sees: Sees, pattern: Pattern) -> np.ndarray:
    """The pattern's sizes are taken as they are."""
    length = len(k)
    seen = sees.blocks(64, 64)
    keep = np.zeros_like(seen)
    if pattern.kind == BLOCK_SPARSE:
        keys = means(k, 64)
        for i, query in enumerate(means(q, 64)):
            best = sorted((j for j in range(len(seen)) if seen[i, j]), key=lambda j: -(keys[j] @ query))
            keep[i, best[: pattern.vertical]] = True
        return keep
    rows = range(max(0, length - 64), length)
    weights = attention(q, k, sees, rows)
    by_key, distances = weights.sum(0), by_distance(weights, rows)
    if pattern.kind == A_SHAPE:
        by_key = distances = -np.arange(length, dtype=float)
    keys = sorted(range(length), key=lambda key: (key >= 30, -by_key[key]))[: max(30, pattern.vertical)]
    slashes = sorted(range(length), key=lambda d: (d >= 100, -distances[d]))[: max(100, pattern.slash)]
    for key in keys:
        keep[:, key // 64] = True
    for i, distance in ((i, d) for i in range(len(seen)) for d in slashes):
        for row in range(64 * i, 64 * (i + 1)):
            if 0 <= row - distance < length:
                keep[i, (row - distance) // 64] = True
    return keep
