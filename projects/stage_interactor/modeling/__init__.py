"""The paper, one idea a file.

Read in this order: geometry (positions and boxes), queries, decoder (the cascade and one stage),
attention, sampling, mixing; then matcher, assigner, criterion (training); backbone, deformable,
neck and detector put it together. layers holds how linear layers start.
"""

from .assigner import CrossStageAssigner, OneToOneAssigner
from .attention import OverlapAttention
from .backbone import BackboneError, TimmBackbone, timm_channels
from .build import build_decoder
from .criterion import Criterion
from .decoder import Decoder, DecoderStage, FeedForward, PredictionHead, StageOutput
from .detector import StageInteractor
from .matcher import DetrStyleMatcher, HungarianMatcher, Targets
from .mixing import CascadeMixing, Filters, StaticMixing
from .neck import ChannelMapper
from .queries import InitialQueries
from .sampling import PointSampler, TwoStageSampler, VanillaSampler

__all__ = [
    "BackboneError",
    "CascadeMixing",
    "ChannelMapper",
    "Criterion",
    "CrossStageAssigner",
    "Decoder",
    "DecoderStage",
    "DetrStyleMatcher",
    "FeedForward",
    "Filters",
    "HungarianMatcher",
    "InitialQueries",
    "OneToOneAssigner",
    "OverlapAttention",
    "PointSampler",
    "PredictionHead",
    "StageInteractor",
    "StageOutput",
    "StaticMixing",
    "Targets",
    "TimmBackbone",
    "TwoStageSampler",
    "VanillaSampler",
    "build_decoder",
    "timm_channels",
]
