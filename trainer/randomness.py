"""Random numbers that depend on a seed and an example's position only: neither on the topology nor on what ran before.

TensorFlow's stateless generators take one seed a call, not one an example; mapping them over a batch costs more than the
model. So the numbers come from a hash of counters, in a handful of vector operations that every device and XLA have.
"""

import tensorflow as tf


@tf.function(jit_compile=True, autograph=False)  # A dozen operations on small integers: one pass instead.
def uniform(positions: tf.Tensor, num: int, seed: int, stream: int) -> tf.Tensor:
    """`num` random numbers for each example.

    Each is the finaliser of MurmurHash3 (https://github.com/aappleby/smhasher/blob/master/src/MurmurHash3.cpp, `fmix32`)
    over a key of the example and the number's index.

    Args:
        positions: int64 [b], not negative.
        num: how many numbers an example.
        seed: the job's seed.
        stream: another value for each use, so that uses are independent.

    Returns:
        float32 [b, num] in [0, 1).
    """
    low = tf.cast(tf.bitwise.bitwise_and(positions, 0xFFFFFFFF), tf.uint32)
    high = tf.cast(tf.bitwise.right_shift(positions, 32), tf.uint32)
    key = (seed * 0x9E3779B1 + stream * 0x85EBCA77) % 2**32
    example = _mix(_mix(low ^ key) + _mix(high ^ 0x27D4EB2F))
    number = _mix(tf.cast(tf.range(1, num + 1), tf.uint32) * 0x9E3779B1)
    bits = _mix(example[:, tf.newaxis] ^ number)
    # The upper 24 bits: as many as a float32 holds exactly.
    return tf.cast(tf.bitwise.right_shift(bits, 8), tf.float32) * 2.0**-24


def _mix(x: tf.Tensor) -> tf.Tensor:
    x ^= tf.bitwise.right_shift(x, 16)
    x *= 0x85EBCA6B
    x ^= tf.bitwise.right_shift(x, 13)
    x *= 0xC2B2AE35
    return x ^ tf.bitwise.right_shift(x, 16)
