"""Zero-shot evaluation with lm-eval: the adapter, the task suites, and an evaluator that serves many models."""

from flowhn.evaluation.evaluator import Evaluator
from flowhn.evaluation.lm import FlowHNLM

__all__ = ["Evaluator", "FlowHNLM"]
