"""tf_keras (Keras 2): the same program as `keras_fit`, with the package that came before."""

import tf_keras

from benchmarks.peers import keras_fit

if __name__ == "__main__":
    keras_fit.train(tf_keras)
