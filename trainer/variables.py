"""The variables of a job: on the devices of its strategy, and once more beside them for what is exported."""

import keras
import tensorflow as tf

from trainer import custom, steps
from trainer.config import Config
from trainer.dataset import Dataset
from trainer.models import inference_model, training_model
from trainer.optimizers import Schedule, make_optimizer
from trainer.plan import Plan
from trainer.topology import Topology


def make_state(config: Config, plan: Plan, dataset: Dataset, topology: Topology) -> tuple[steps.State, keras.Model]:
    """The variables of the job, and a model outside of the strategy to export."""
    input_shape, num_classes = dataset.image_shape, dataset.num_classes
    with topology.strategy.scope():
        synchronized = config.sync_batch_norm and topology.num_replicas > 1
        model = training_model(config, input_shape, num_classes, synchronized=synchronized)
        schedule = Schedule(config, plan.total_steps)
        state = steps.State(
            model=model,
            inference=inference_model(config, input_shape, num_classes),
            optimizer=make_optimizer(config, schedule, model),
            schedule=schedule,
            gradients=_gradients_kept(model) if config.histograms_every else (),
        )
    steps.make_copy_weights(state, topology.strategy)()
    plain = inference_model(config, input_shape, num_classes)
    if config.is_custom_model:
        custom.check_call(config.model, plain)
    return state, plain


def _gradients_kept(model: keras.Model) -> list[tf.Variable]:
    """Variables for the gradients of the last step. They are the same on all replicas, so none is asked of the others."""
    return [
        tf.Variable(
            tf.zeros(variable.shape, variable.dtype),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
        for variable in model.trainable_variables
    ]
