"""A small trained model that ships with the package, and what quantization does to it."""

from pathlib import Path

DATA = Path(__file__).parent / "data"
MODEL = DATA / "model"
HELD_OUT = DATA / "held_out.txt"
CALIBRATION = DATA / "calibration.txt"

# Two texts of 10,000 tokens for the search for alpha: of the model's domain, small programming problems, and of another, English prose.
PROBLEMS = DATA / "calibration_problems.jsonl"
PROSE = DATA / "calibration_prose.txt"
