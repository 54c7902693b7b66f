"""In what the replies of a round differ, values aside: Flower's strategies take them all alike, or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

from flwr.app import ArrayRecord, MetricRecord, RecordDict


class Part(NamedTuple):
    """A record of a reply, or a metric in one."""

    sort: Literal["arrays", "metrics", "metric"]
    record: str
    key: str = ""
    length: int = -1
    """Of a list; -1 is a single number."""

    def __str__(self) -> str:
        if self.sort != "metric":
            return f"a record of {self.sort} {self.record!r}"
        return f"metric {self.key!r} in {self.record!r}" + (f" of length {self.length}" if self.length >= 0 else "")


Kind = frozenset[Part]


def kind_of(content: RecordDict, hidden: Collection[str]) -> Kind:
    """What a reply is made of, but for metrics that play no part."""
    parts: list[Part] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            parts.append(Part("arrays", name))
        elif isinstance(record, MetricRecord):
            parts.append(Part("metrics", name))
            shown = {key: value for key, value in record.items() if key not in hidden}
            parts += [Part("metric", name, key, len(v) if isinstance(v, list) else -1) for key, v in shown.items()]
    return frozenset(parts)


def odd_ones(kinds: Mapping[int, Kind], weight_keys: Collection[str]) -> list[dict[int, str]]:
    """Ways to make replies alike: which to leave out, and why each; the likeliest first, none where they are alike.

    The most frequent kind is likely the right one. Of two that are as frequent it is that with one record of each sort
    that tells what updates are weighed by, then that of the first client.

    Args:
        kinds: of the replies, in the order of clients.
        weight_keys: metrics that updates are weighed by.
    """
    counted = Counter(kinds.values())
    likely = sorted(counted, key=lambda kind: (-counted[kind], not _is_complete(kind, weight_keys)))  # stable
    if len(likely) < 2:
        return []
    return [
        {
            index: f"its reply is not made as most are: it {_difference(kind, usual)}"
            for index, kind in kinds.items()
            if kind != usual
        }
        for usual in likely
    ]


def _is_complete(kind: Kind, weight_keys: Collection[str]) -> bool:
    sorts = Counter(part.sort for part in kind)
    keys = {part.key for part in kind if part.sort == "metric"}
    return sorts["arrays"] == sorts["metrics"] == 1 and keys.issuperset(weight_keys)


def _difference(kind: Kind, usual: Kind) -> str:
    found = (("lacks", usual - kind), ("has", kind - usual))
    return " and ".join(f"{word} {', '.join(map(str, sorted(parts)))}" for word, parts in found if parts)
