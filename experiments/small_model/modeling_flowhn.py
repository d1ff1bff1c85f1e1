from flowhn.hf.modeling import FlowHNForCausalLM

__all__ = ["FlowHNForCausalLM"]
