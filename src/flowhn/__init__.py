"""flowhn: a PyTorch Lightning reproduction of FlowHN, the parallel hybrid of attention and Mamba (arXiv 2505.19472)."""

__version__ = "0.1.0"
