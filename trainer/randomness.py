"""Random numbers that depend on a seed and an example's position only: neither on the topology nor on what ran before.

TensorFlow's stateless generators take one seed a call, not one an example; mapping them over a batch costs more than the
model. So the numbers come from a hash of counters, in a handful of vector operations that every device and XLA have.
"""

import tensorflow as tf

from trainer.passes import compiled


@compiled  # A dozen operations on small integers: one pass instead.
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


def shuffled(indices: tf.Tensor, epochs: tf.Tensor, num: int, seed: int, stream: int) -> tf.Tensor:
    """Where `RandomIndexShuffle` takes indices: for each epoch another permutation of 0 to `num` - 1, without state.

    The raw op, because TensorFlow 2.21's `tf.random.experimental.index_shuffle` pads the wrong axis of more than one seed and
    so takes only one. Two flaws of the op's kernel (tensorflow/core/kernels/random_index_shuffle.cc) are worked around: it never
    gives the last index where that is a power of four from 65,536 on, and below that knows each part of a key by its low byte.

    Args:
        indices: int64 [n], of 0 to `num` - 1.
        epochs: int64 [n].
        num: how many are permuted.
        seed: the job's seed.
        stream: another value for each use.

    Returns:
        int64 [n].
    """
    last = num - 1
    flawed = last >= 2**16 and last & (last - 1) == 0
    # The bytes above the lowest, in a part that is otherwise the same for all.
    rest = tf.bitwise.bitwise_xor(tf.constant(151 * stream % 256 ^ _folded(seed // 256), tf.int64), 173 * (epochs // 256) % 256)
    keys = tf.stack([rest, tf.fill(tf.shape(epochs), tf.cast(seed, tf.int64)), epochs], axis=1)
    bound = tf.constant(last + flawed, tf.int64)

    def permuted(values: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.RandomIndexShuffle(index=values, seed=keys, max_index=bound, rounds=4)

    found = permuted(indices)
    # One more than wanted is permuted: what came out as that one goes where that one went.
    return tf.where(found == num, permuted(tf.fill(tf.shape(indices), tf.cast(num, tf.int64))), found) if flawed else found


def _folded(number: int) -> int:
    """The exclusive or of a number's bytes."""
    folded = 0
    while number:
        folded, number = folded ^ (number & 255), number >> 8
    return folded


def _mix(x: tf.Tensor) -> tf.Tensor:
    x ^= tf.bitwise.right_shift(x, 16)
    x *= 0x85EBCA6B
    x ^= tf.bitwise.right_shift(x, 13)
    x *= 0xC2B2AE35
    return x ^ tf.bitwise.right_shift(x, 16)
