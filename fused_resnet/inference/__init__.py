"""Inference: `optimize_for_inference` folds a trained network into a plan of fused steps. docs/inference.md."""

from fused_resnet.inference.module import InferenceModule
from fused_resnet.inference.optimize import load_inference, optimize_for_inference, save_inference

__all__ = ["InferenceModule", "load_inference", "optimize_for_inference", "save_inference"]
