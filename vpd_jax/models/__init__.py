"""Batch to Outputs: backbones, contexts, methods, necks and heads."""
