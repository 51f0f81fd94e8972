"""Distillation of gates and SwiftKV weights: data, trainer, and the evaluation of what it made."""
