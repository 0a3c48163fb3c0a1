"""Measure once, quantize often: python share_statistics.py MODEL calibration.txt DIRECTORY

The statistics are per-channel maxima by layer name, the same as other tools publish as activation scales.
"""

import sys
from pathlib import Path

import smoothquant_plus as sq


def main(model: str, text: str, directory: str) -> None:
    statistics = sq.calibrate(
        model, Path(directory) / "act_scales.safetensors", calibration=sq.Calibration(text=[text], samples=16, seq_len=128)
    )
    for alpha in (0.5, 0.75):
        result = sq.quantize(model, Path(directory) / f"alpha-{alpha}", alpha=alpha, calibration=sq.Calibration(statistics=statistics))
        print(f"{result.output}: equivalence error {result.equivalence_error:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
