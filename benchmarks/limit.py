"""The best matrix product rate of this machine, in floating-point operations a second: what training is told against."""

import argparse
import json
import time

import tensorflow as tf

from trainer.machine import computes_in_bfloat16

_SIZES = (1024, 2048, 3072)
_SECONDS = 1.5


def operations_per_second(dtype: tf.DType, size: int) -> float:
    """The rate of products of two square matrices, the fastest of several."""
    left, right = (tf.cast(tf.random.stateless_normal([size, size], (seed, 0)), dtype) for seed in range(2))
    multiply = tf.function(tf.linalg.matmul)
    multiply(left, right)
    fastest, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        # On a CPU it has ended when it returns; `numpy` would copy the product.
        multiply(left, right)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    rates = {size: operations_per_second(tf.as_dtype(options.precision), size) for size in _SIZES}
    native = options.precision != "bfloat16" or computes_in_bfloat16()
    print(json.dumps({"operations_per_second": max(rates.values()), "has_instructions": native}))


if __name__ == "__main__":
    main()
