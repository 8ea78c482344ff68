"""Extensions together: which go with which."""

from ..detector import StageInteractor
from .fixed_point import FixedPointDecoder
from .hybrid_matching import HybridCriterion, HybridDecoder, HybridQueries
from .iou_aware import IoUAwareCriterion
from .query_groups import GroupedCriterion, GroupedDecoder, GroupedQueries
from .recollection import RecollectingCriterion, RecollectingDecoder


class GroupedIoUAwareCriterion(IoUAwareCriterion, GroupedCriterion):
    """The class losses of the one with the groups of the other."""


class RecollectingIoUAwareCriterion(IoUAwareCriterion, RecollectingCriterion):
    """The class losses of the one with the recollected queries of the other."""


class HybridIoUAwareCriterion(IoUAwareCriterion, HybridCriterion):
    """The class losses of the one with the two sets of queries of the other."""


# Of what comes in several parts, the kind of each part of a model.
_TOGETHER = (
    {"queries": GroupedQueries, "decoder": GroupedDecoder, "criterion": GroupedCriterion},
    {"queries": HybridQueries, "decoder": HybridDecoder, "criterion": HybridCriterion},
    {"decoder": FixedPointDecoder},
    {"decoder": RecollectingDecoder, "criterion": RecollectingCriterion},
)


def require_parts_that_fit(model: StageInteractor) -> None:
    """Of a model that is to be trained.

    Raises:
        ValueError: the model has one part of an extension without the others, or one that is
            frozen, with which it would be trained on something else than what is meant.
    """
    for kinds in _TOGETHER:
        has = {part: isinstance(getattr(model, part), kind) for part, kind in kinds.items()}
        if any(has.values()) and not all(has.values()):
            wanted = ", ".join(
                f"model.{part.replace('decoder', 'decoder.parts.cascade')} to {kind.__name__}"
                for part, kind in kinds.items()
                if not has[part]
            )
            found = ", ".join(kinds[part].__name__ for part, there in has.items() if there)
            raise ValueError(f"{found} is one part of an extension: set {wanted} too")
        frozen = [part for part in kinds if has[part] and part in model.frozen_parts]
        if frozen:  # it would do what it does where it detects
            raise ValueError(
                f"train.freeze: {', '.join(frozen)} cannot be frozen as a whole with "
                f"{kinds[frozen[0]].__name__}; name what is inside, such as decoder.stages or "
                "queries.content"
            )
