"""Data: descriptions of modalities, shards on disk, and loaders that turn them into batches."""

from mmfast.data.assemble import Batch
from mmfast.data.loader import Data, Loader
from mmfast.data.modality import Audio, DataConfig, Image, Modality, Text
from mmfast.data.plan import Plan
from mmfast.data.shards import Dataset, ShardIndex, ShardWriter

__all__ = [
    "Audio",
    "Batch",
    "Data",
    "DataConfig",
    "Dataset",
    "Image",
    "Loader",
    "Modality",
    "Plan",
    "ShardIndex",
    "ShardWriter",
    "Text",
]
