"""Distillation of gates: data, trainer, evaluation of what it made."""
