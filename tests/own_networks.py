"""The text of a module with a network of one's own, in parts; the fixture `module` writes it."""

START = """
import keras
def build(input_shape, num_classes, config):
    images = keras.Input(input_shape)
    x = keras.layers.Flatten()(images)
"""
END = "    return keras.Model(images, keras.layers.Dense(num_classes)(x))\n"
TELLS = "    def compute_output_shape(self, shape):\n        return shape\n"
