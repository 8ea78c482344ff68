"""Weights of the classes in the focal loss, by their names or by how rare they are."""

from collections import Counter
from collections.abc import Mapping, Sequence

from ..config import ConfigError, is_meant

BALANCED = "balanced"
_LEAST, _MOST = 0.2, 5.0  # of a balanced weight: beyond these rare classes cost the others more


def class_weights(
    wanted: str | Mapping[str, float] | None,
    names: Sequence[str],
    records: Sequence[Mapping],
) -> list[float] | None:
    """Of each class, by its index; None where all are 1.

    Args:
        wanted: ``train.class_weights``: by name, 1 for those that are not named; or ``"balanced"``,
            the square root of how many times rarer than the average class a class is, from 0.2
            to 5.
        names: of the classes.
        records: that are trained on, detectron2's dataset dicts.

    Raises:
        ConfigError: there is no class of such a name, or none has a weight.
    """
    if wanted is None:
        return None
    if wanted == BALANCED:
        counts = Counter(
            item["category_id"]
            for record in records
            for item in record.get("annotations", ())
            if not item.get("iscrowd", 0)
        )
        mean = sum(counts.values()) / max(len(counts), 1)
        return [
            min(max((mean / counts[index]) ** 0.5, _LEAST), _MOST) if counts[index] else 1.0
            for index in range(len(names))
        ]
    assert isinstance(wanted, Mapping)
    given = {str(name): weight for name, weight in wanted.items()}
    for name in given.keys() - set(names):
        hint = is_meant(name, names) or f"there are {', '.join(names)[:300]}"
        raise ConfigError(f"train.class_weights: there is no class {name!r}; {hint}")
    weights = [float(given.get(name, 1.0)) for name in names]
    if not any(weights):
        raise ConfigError("train.class_weights are all 0: then no class is learned")
    return weights
