"""Places of labels beside points: apart from each other and off the points, if there is room."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_efr.types import BoolArray, FloatArray, IntArray

_RINGS = np.array([9.0, 15.0, 22.0, 31.0, 42.0, 55.0, 70.0, 88.0])
_ANGLES = np.linspace(0.0, 2 * np.pi, 16, endpoint=False)
_PAD = 1.5  # that stays free round a label
_TRIES = 6  # orders in which labels choose; the cheapest outcome counts
_MOST = 180  # labels that choose, over all tries: above 30 labels there are fewer tries
_LIKED = np.array([0.2, 0.1])  # of places as good, the one on the right and above
# what a place costs besides its distance
_ON_LABEL, _ON_POINT = 100.0, 5.0  # a unit of area
_LINE_ON_LABEL, _LINE_ON_POINT, _LINE_ON_LINE = 500.0, 25.0, 60.0  # each that a line crosses


class Placed(NamedTuple):
    """The labels' middles, [n, 2]; which need a line to their points, [n], and its ends, [n, 2]."""

    middles: FloatArray
    lined: BoolArray
    ends: FloatArray


def place(points: FloatArray, sizes: FloatArray, taken: FloatArray, frame: FloatArray) -> Placed:
    """Give the label of each point, [n, 2], a place; `sizes` [n, 2] are widths and heights.

    Of rings of places round its point a label takes that of least overlap with the other labels,
    with the boxes `taken` [m, 4], and with what is outside `frame` [4]; of equal ones the nearest,
    on the right. A box is left, bottom, right, top; all lengths are in points.
    """
    distances = np.repeat(_RINGS, len(_ANGLES))
    ways = np.tile(np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1), (len(_RINGS), 1))
    # a label touches its ring with a corner or with the middle of a side
    offsets = distances[:, None] * ways + np.clip(1.5 * ways, -1, 1) * sizes[:, None] / 2
    middles = points[:, None] + offsets
    half = sizes[:, None] / 2 + _PAD
    boxes = np.concatenate([middles - half, middles + half], axis=2)
    ends = np.clip(points[:, None], middles - half, middles + half)
    lined = distances > _RINGS[0]
    # what a place costs, whatever the other labels have
    hidden = np.prod(2 * half, axis=2) - _overlap(boxes, frame)
    cost = distances - ways @ _LIKED + _ON_LABEL * hidden
    for box in taken:
        cost += _ON_POINT * _overlap(boxes, box)
        cost += _LINE_ON_POINT * lined * _crosses(points[:, None], ends, box)
    every = np.arange(len(points))
    orders = np.random.default_rng(0)
    places = _Places(points, ends, boxes, lined, cost)
    tries = min(_TRIES, max(1, _MOST // len(points)))
    settled = [places.settle(orders.permutation(every)) for _ in range(tries)]
    chosen = min(settled, key=places.total)
    return Placed(middles[every, chosen], lined[chosen], ends[every, chosen])


class _Places(NamedTuple):
    """The places that labels may take: lines from `points` [n, 2] to `ends` [n, places, 2], if they
    are `lined` [places]; `boxes` [n, places, 4]; the `cost` of each alone, [n, places].
    """

    points: FloatArray
    ends: FloatArray
    boxes: FloatArray
    lined: BoolArray
    cost: FloatArray

    def settle(self, order: IntArray) -> IntArray:
        """Let the labels choose in this order, again and again, until none would move; [n].

        Each move makes the whole cheaper, so this ends.
        """
        chosen = self.cost.argmin(axis=1)
        moved = True
        while moved:
            moved = False
            for own in order:
                cost = self.cost[own] + self.shared(own, chosen)
                best = cost.argmin()
                if cost[best] < cost[chosen[own]] - 1e-6:
                    chosen[own], moved = best, True
        return chosen

    def shared(self, own: int, chosen: IntArray) -> FloatArray:
        """The cost of the others' places to one label, at each of its own, [places]."""
        others = np.flatnonzero(np.arange(len(chosen)) != own)
        at = chosen[others]
        mine = self.points[own], self.ends[own][:, None]
        theirs = self.points[others], self.ends[others, at]
        box, boxes = self.boxes[own][:, None], self.boxes[others, at]
        from_me, from_them = self.lined[:, None], self.lined[at]
        over = 1.0 * (from_me & _crosses(*mine, boxes)) + (from_them & _crosses(*theirs, box))
        met = from_me & from_them & _meet(*mine, *theirs)
        found = _ON_LABEL * _overlap(box, boxes) + _LINE_ON_LABEL * over + _LINE_ON_LINE * met
        return found.sum(axis=1)

    def total(self, chosen: IntArray) -> float:
        """The cost of all places together."""
        alone = self.cost[np.arange(len(chosen)), chosen].sum()
        pairs = [self.shared(own, chosen)[at] for own, at in enumerate(chosen)]
        return float(alone + sum(pairs) / 2)


def _overlap(one: FloatArray, other: FloatArray) -> FloatArray:
    """The area that boxes have in common, [..., 4] and [..., 4] -> [...]."""
    low = np.maximum(one[..., :2], other[..., :2])
    high = np.minimum(one[..., 2:], other[..., 2:])
    return np.prod(np.maximum(high - low, 0.0), axis=-1)


def _crosses(start: FloatArray, end: FloatArray, box: FloatArray) -> BoolArray:
    """True if a line from `start` to `end`, [..., 2], has a part in a box, [..., 4]."""
    way = np.where(end == start, 1e-9, end - start)
    ends = np.stack([(box[..., :2] - start) / way, (box[..., 2:] - start) / way])
    enters = np.maximum(ends.min(axis=0).max(axis=-1), 0.0)
    leaves = np.minimum(ends.max(axis=0).min(axis=-1), 1.0)
    return enters < leaves


def _meet(start: FloatArray, end: FloatArray, from_: FloatArray, to: FloatArray) -> BoolArray:
    """True if two lines cross, each from its first to its second point, [..., 2]."""

    def side(one: FloatArray, other: FloatArray, point: FloatArray) -> FloatArray:
        a, b = other - one, point - one
        return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]

    apart = side(start, end, from_) * side(start, end, to) < 0
    return apart & (side(from_, to, start) * side(from_, to, end) < 0)
