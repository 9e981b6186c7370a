"""Rows, renderers and training each_inputs, as the tests of our own stages have them."""

from tests.data.conftest import renderer, write_file
from tests.train.conftest import make_inputs, model_folder

__all__ = ["make_inputs", "model_folder", "renderer", "write_file"]
