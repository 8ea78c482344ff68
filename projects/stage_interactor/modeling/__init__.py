"""The paper, one idea a file.

Read in this order: detector (the whole, in four lines); geometry and queries (what it starts from);
decoder (the cascade, and how it is built), stage, attention, sampling, mixing (one stage of it);
matcher, assigner, criterion (training); backbone, plain_backbone, neck, deformable (features).
layers holds how linear layers start, batches which images go through the detector together.
"""

from .assigner import CrossStageAssigner, OneToOneAssigner
from .attention import OverlapAttention
from .backbone import BackboneError, TimmBackbone, timm_channels
from .criterion import Criterion
from .decoder import Decoder, build_decoder
from .detector import StageInteractor
from .matcher import DetrStyleMatcher, HungarianMatcher, Targets
from .mixing import CascadeMixing, Filters, StaticMixing
from .neck import ChannelMapper
from .plain_backbone import PlainBackbone
from .queries import InitialQueries
from .sampling import PointSampler, TwoStageSampler, VanillaSampler
from .stage import DecoderStage, FeedForward, PredictionHead, StageOutput

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
    "PlainBackbone",
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
