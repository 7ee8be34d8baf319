"""What lanes with and without packing must plan, in plain words of Python."""

import numpy as np


def lengths_like(median, mean, count, seed=0):
    """Stored lengths of documents whose lengths are log-normal."""
    deviation = np.sqrt(2 * np.log(mean / median))
    lengths = np.random.default_rng(seed).lognormal(np.log(median), deviation, count)
    return np.maximum(2, lengths.astype(np.int64))


def segments_of(plans):
    """Per lane, (document, offset, length, start, guests) of each segment in order of time.

    The guests are a list of (begin, document, length), or None.
    """
    lanes = [[] for _ in plans[0].documents]
    for plan in plans:
        batch, window = plan.documents.shape
        found = [[None if plan.guests is None else [] for _ in range(window)] for _ in range(batch)]
        if plan.guests is not None:
            where, *others = (part.tolist() for part in plan.guests)
            for segment, *guest in zip(where, *others, strict=True):
                found[segment // window][segment % window].append(tuple(guest))
        parts = [part.tolist() for part in plan[:4]]
        for lane in range(batch):
            for column in range(window):
                own = tuple(part[lane][column] for part in parts)
                lanes[lane].append((*own, found[lane][column]))
    return lanes


def expected_segments(units, positions, n, batch, slots):
    """Per lane, what `segments_of` finds, if lanes take units in their order, slot by slot.

    Args:
        units: iterator over (document, guests); the guests are None without packing.
    """
    lanes = [[] for _ in range(batch)]
    current = [(0, None, 0)] * batch  # document, guests, offset; without tokens at first
    left = [0] * batch
    for _ in range(slots):
        for lane in range(batch):
            if not left[lane]:
                document, guests = next(units)
                current[lane] = document, guests, 0
                left[lane] = positions[document]
            document, guests, offset = current[lane]
            length = min(n, left[lane])
            behind = None if guests is None else []
            left[lane] -= length
            if guests and not left[lane]:
                begin = length
                for guest in guests:
                    behind.append((begin, guest, positions[guest]))
                    begin += positions[guest]
            lanes[lane].append((document, offset, length, offset == 0, behind))
            current[lane] = document, guests, offset + n
    return lanes
