"""mmfast: fused layers, honest benchmarks and FSDP2 training jobs for multimodal models."""

__version__ = "0.1.0"
