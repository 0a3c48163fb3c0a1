"""A small trained model that ships with the package, and what quantization does to it."""

from pathlib import Path

DATA = Path(__file__).parent / "data"
MODEL = DATA / "model"
HELD_OUT = DATA / "held_out.txt"
CALIBRATION = DATA / "calibration.txt"
