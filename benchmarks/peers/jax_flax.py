"""JAX with Flax NNX and Optax, as in Flax's MNIST tutorial: one jitted step, batches cut from a permutation."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.peers import session


class Network(nnx.Module):
    """The article's network; images [b, 28, 28, 1] to logits [b, 10]."""

    def __init__(self, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 32, (3, 3), dtype=dtype, rngs=rngs)
        self.norm1 = nnx.BatchNorm(32, dtype=dtype, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), dtype=dtype, rngs=rngs)
        self.norm2 = nnx.BatchNorm(64, dtype=dtype, rngs=rngs)
        self.dense1 = nnx.Linear(7 * 7 * 64, 128, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(session.DROPOUT_RATE, rngs=rngs)
        self.dense2 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits."""
        x = nnx.max_pool(self.norm1(nnx.relu(self.conv1(images))), (2, 2), (2, 2))
        x = nnx.max_pool(self.norm2(nnx.relu(self.conv2(x))), (2, 2), (2, 2))
        x = self.dropout(nnx.relu(self.dense1(x.reshape(x.shape[0], -1))))
        return self.dense2(x)


def main() -> None:
    """Prints JSON."""
    options = session.parse(__doc__)
    images, labels = session.examples(options)
    model = Network(jnp.bfloat16 if options.precision == "bfloat16" else jnp.float32, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(session.LEARNING_RATE), wrt=nnx.Param)

    def loss_fn(model: Network, batch: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(batch).astype(jnp.float32), targets).mean()

    @nnx.jit
    def train_step(model: Network, optimizer: nnx.Optimizer, batch: jax.Array, targets: jax.Array) -> jax.Array:
        loss, gradients = nnx.value_and_grad(loss_fn)(model, batch, targets)
        optimizer.update(model, gradients)
        return loss

    random = np.random.default_rng(0)

    def train_epoch() -> float:
        batches = random.permutation(len(images)).reshape(options.steps, options.batch)
        losses = [train_step(model, optimizer, images[indices], labels[indices]) for indices in batches]
        return float(jnp.stack(losses).mean())

    model.train()
    session.run(options, {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__}, train_epoch)


if __name__ == "__main__":
    main()
