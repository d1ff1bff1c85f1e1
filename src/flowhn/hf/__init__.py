"""Our models as transformers models: what the files in an exported folder import (``trust_remote_code=True``)."""

from flowhn.hf.configuration import FlowHNConfig
from flowhn.hf.modeling import FlowHNForCausalLM

__all__ = ["FlowHNConfig", "FlowHNForCausalLM"]
