"""Cut a step's global batch into R x K packs (R ranks, K micro-steps) of even cost and bounded length.

Every rank computes the whole assignment from lengths alone and takes its own part, so nothing is
communicated; all arithmetic is on integers, so that unlike machines agree to the bit. The search is
longest-processing-time-first (Graham, 1969), then exchanges of samples between the heaviest pack and a
lighter one until the packs are level. B samples, n = R*K packs.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# Packs within 1 % of the mean are level: more search would save less time than it takes.
_LEVEL_PERCENT = 1
# With five samples a pack, what LPT ends in depends on how it ranks one large sample against several middle
# ones, so it is started anew with large samples counted heavier, by these percents for each mean cost above
# the mean.
_BIASES_PERCENT = (0, 1, 2, 4)
_LIGHT_PACKS = 48  # partners that an exchange considers first; all others when none of these helps
_OVERFULL = 1 << 60  # above every cost: a pack over max_tokens is worse than any pack that is not


@dataclass(frozen=True)
class SampleCost:
    """What training on a sample costs, in FLOPs of a forward pass (a backward pass scales all alike).

    Attributes:
        per_token: each packed token: twice the backbone's parameters without its embeddings.
        per_vision_target: each predicted vision token: twice the head's parameters.
        per_text_target: each predicted text token: twice the output embedding's parameters.
        per_pair: each pair of tokens that see each other: 4 * layers * heads * head width.
    """

    per_token: float
    per_vision_target: float = 0.0
    per_text_target: float = 0.0
    per_pair: float = 0.0

    def of(self, lengths: Int64, vision_targets: Int64, text_targets: Int64) -> Int64:
        """int64 `[B]`, at least 1: cost in units of a thousandth of a token's cost.

        A causal document of l tokens has l(l+1)/2 pairs; the few more inside the patches are left out.
        """
        flops = (
            self.per_token * lengths
            + self.per_vision_target * vision_targets
            + self.per_text_target * text_targets
            + self.per_pair * (lengths * (lengths + 1) // 2)
        )
        return np.maximum(1, flops * (1000.0 / self.per_token)).astype(np.int64)


@dataclass(frozen=True)
class Assignment:
    """Which samples of the global batch go where.

    Attributes:
        packs: `[rank][micro_step]` -> int64 indices into the global batch, ascending, never empty.
        costs: int64 `[R, K]`, the packs' costs. Packs of one micro-step are neighbours in cost, because
            ranks that gather parameters together wait for the slowest in each micro-step.
        tokens: int64 `[R, K]`, the packs' lengths in tokens.
        max_tokens: the limit that they were packed under.
    """

    packs: list[list[Int64]]
    costs: Int64
    tokens: Int64
    max_tokens: int

    @property
    def micro_steps(self) -> int:
        """K, the same on all ranks."""
        return self.costs.shape[1]

    @property
    def imbalance(self) -> float:
        """Cost of the heaviest pack over the mean cost, at least 1."""
        return float(self.costs.max() / self.costs.mean())

    @property
    def utilization(self) -> float:
        """Tokens of the batch over the R*K*max_tokens that the packs could hold, at most 1."""
        return float(self.tokens.sum() / (self.tokens.size * self.max_tokens))


def assign(lengths: Int64, costs: Int64, ranks: int, max_tokens: int) -> Assignment:
    """Cut a batch into the smallest number of packs a rank that holds it, as even in cost as possible.

    Args:
        lengths: int64 `[B]`, tokens of each sample, positive.
        costs: int64 `[B]`, cost of each sample in any unit, at least 1, with a sum below 2**60.
        ranks: R.
        max_tokens: limit of a pack.

    Returns:
        The assignment; a pure function of the arguments.

    Raises:
        ValueError: no assignment exists: a sample is longer than `max_tokens`, there are fewer samples than
            ranks, or they fill no whole number of packs on each rank (see `fits`).
    """
    most = len(lengths) // ranks
    fewest = min(most, -(-int(lengths.sum()) // (ranks * max_tokens)))
    for micro_steps in range(max(1, fewest), most + 1):
        pack_of = _pack(lengths, costs, ranks * micro_steps, max_tokens)
        if pack_of is not None:
            return _deal(pack_of, lengths, costs, ranks, max_tokens)
    if most:
        pack_of = _pair(lengths, ranks * most)
        if np.bincount(pack_of, weights=lengths).max() <= max_tokens:
            return _deal(pack_of, lengths, costs, ranks, max_tokens)
    raise ValueError(
        f"{len(lengths)} samples of up to {int(lengths.max(initial=0))} tokens cannot be cut into packs "
        f"of at most {max_tokens} tokens, equally many for each of {ranks} ranks: raise max_tokens, or "
        "choose a global batch that the number of ranks divides"
    )


def _pair(lengths: Int64, packs: int) -> Int64:
    """The pack of each sample in as many packs as possible: the shortest 2(B - packs) samples in pairs,
    longest with shortest, and all others alone. That makes the longest pair as short as any pairing can;
    where the ranks divide the batch, each sample is alone.
    """
    extra = len(lengths) - packs
    order = np.argsort(lengths, kind="stable")
    pack_of = np.empty(len(lengths), np.int64)
    pack_of[order[extra:]] = np.arange(packs)
    pack_of[order[:extra]] = np.arange(extra)[::-1]
    return pack_of


def _pack(lengths: Int64, costs: Int64, packs: int, max_tokens: int) -> Int64 | None:
    """The pack of each sample, or None where the search found no way to keep all packs under `max_tokens`."""
    mean = max(1, int(costs.sum()) // packs)
    level = mean + mean * _LEVEL_PERCENT // 100
    best: Int64 | None = None
    best_load = _OVERFULL
    for bias in _BIASES_PERCENT:
        search = _Exchanges(_longest_first(costs, packs, bias), lengths, costs, packs, max_tokens)
        load = search.run(level)
        if load < best_load:
            best, best_load = search.pack_of, load
        if best_load <= level:
            break
    return best


def _longest_first(costs: Int64, packs: int, bias_percent: int) -> Int64:
    """LPT: by falling cost, each sample into the pack that is lightest so far."""
    mean = max(1, int(costs.sum()) // len(costs))
    weights = [max(1, cost + cost * bias_percent * (cost - mean) // (100 * mean)) for cost in costs.tolist()]
    heap = [(0, pack) for pack in range(packs)]
    pack_of = np.empty(len(costs), np.int64)
    for sample in np.argsort(-costs, kind="stable").tolist():
        load, pack = heap[0]
        pack_of[sample] = pack
        heapq.heapreplace(heap, (load + weights[sample], pack))
    return pack_of


class _Exchanges:
    """Local search: the heaviest pack gives a sample away, or swaps one, as long as that helps."""

    def __init__(self, pack_of: Int64, lengths: Int64, costs: Int64, packs: int, max_tokens: int):
        self.pack_of = pack_of
        self._lengths, self._costs, self._max_tokens = lengths, costs, max_tokens
        self._pack_costs = np.zeros(packs, np.int64)
        self._pack_tokens = np.zeros(packs, np.int64)
        np.add.at(self._pack_costs, pack_of, costs)
        np.add.at(self._pack_tokens, pack_of, lengths)
        self._loads = self._load(self._pack_costs, self._pack_tokens)

    def run(self, level: int) -> int:
        """Exchange until the heaviest load is at most `level` or no exchange helps; returns that load."""
        packs = len(self._loads)
        while True:
            heaviest = int(self._loads.argmax())
            if self._loads[heaviest] <= level:
                break
            light = np.argpartition(self._loads, min(_LIGHT_PACKS, packs - 1))[:_LIGHT_PACKS]
            if not self._exchange(heaviest, light[light != heaviest]) and (
                packs <= _LIGHT_PACKS or not self._exchange(heaviest, np.delete(np.arange(packs), heaviest))
            ):
                break
        return int(self._loads.max())

    def _load(self, costs: Int64, tokens: Int64) -> Int64:
        return np.where(tokens <= self._max_tokens, costs, _OVERFULL + tokens)

    def _exchange(self, heavy: int, partners: Int64) -> bool:
        """Make the exchange with one of `partners` that leaves both lightest; False where none helps."""
        is_partner = np.zeros(len(self._loads), bool)
        is_partner[partners] = True
        given = np.flatnonzero(self.pack_of == heavy)  # g samples
        taken = np.flatnonzero(is_partner[self.pack_of])
        # What comes back for a given sample: one of the partners' samples, or nothing.
        owners = np.append(self.pack_of[taken], partners) if len(given) > 1 else self.pack_of[taken]
        nothing = np.zeros(len(owners) - len(taken), np.int64)
        cost = self._costs[given][:, None] - np.append(self._costs[taken], nothing)  # [g, candidates]
        tokens = self._lengths[given][:, None] - np.append(self._lengths[taken], nothing)
        worse = np.maximum(
            self._load(self._pack_costs[heavy] - cost, self._pack_tokens[heavy] - tokens),
            self._load(self._pack_costs[owners] + cost, self._pack_tokens[owners] + tokens),
        )
        if not worse.size or worse.min() >= self._loads[heavy]:
            return False
        row, column = np.unravel_index(int(worse.argmin()), worse.shape)
        light = int(owners[column])
        self.pack_of[given[row]] = light
        if column < len(taken):
            self.pack_of[taken[column]] = heavy
        for pack, sign in ((heavy, -1), (light, 1)):
            self._pack_costs[pack] += sign * cost[row, column]
            self._pack_tokens[pack] += sign * tokens[row, column]
            self._loads[pack] = self._load(self._pack_costs[pack], self._pack_tokens[pack])
        return True


def _deal(pack_of: Int64, lengths: Int64, costs: Int64, ranks: int, max_tokens: int) -> Assignment:
    """Give the packs to ranks and micro-steps: by falling cost, to and fro over the ranks."""
    packs = int(pack_of.max()) + 1
    pack_costs = np.zeros(packs, np.int64)
    pack_tokens = np.zeros(packs, np.int64)
    np.add.at(pack_costs, pack_of, costs)
    np.add.at(pack_tokens, pack_of, lengths)
    grid = np.argsort(-pack_costs, kind="stable").reshape(-1, ranks)  # [K, R]
    grid[1::2] = grid[1::2, ::-1]
    by_pack = np.split(np.argsort(pack_of, kind="stable"), np.cumsum(np.bincount(pack_of))[:-1])
    return Assignment(
        packs=[[by_pack[pack] for pack in column] for column in grid.T],
        costs=pack_costs[grid.T],
        tokens=pack_tokens[grid.T],
        max_tokens=max_tokens,
    )
