"""Accuracy and speed of a model, quantized or not."""
