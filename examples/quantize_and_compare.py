"""Quantize a model and compare it with the original: python quantize_and_compare.py MODEL OUT calibration.txt held_out.txt"""

import sys

import smoothquant_plus as sq


def main(model: str, out: str, calibration_text: str, held_out: str) -> None:
    calibration = sq.Calibration(text=[calibration_text], samples=16, seq_len=128)
    result = sq.quantize(model, out, activations="static", calibration=calibration)
    print(f"{result.bytes_before / 1e6:.1f} MB -> {result.bytes_after / 1e6:.1f} MB, equivalence error {result.equivalence_error:.1e}")
    sq.verify(out, against=model)
    for directory in (model, out):
        print(f"{directory}: perplexity {sq.evaluate(directory, [held_out], seq_len=128).perplexity:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
