"""Running what was quantized: linear layers on a chosen backend, inside an ordinary transformers model."""
