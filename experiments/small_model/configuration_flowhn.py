from flowhn.hf.configuration import FlowHNConfig

__all__ = ["FlowHNConfig"]
