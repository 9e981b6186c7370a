"""Rows, renderers and training jobs, as the tests of our own stages have them."""

from tests.data.conftest import renderer, write_file
from tests.train.conftest import make_job, model_folder

__all__ = ["make_job", "model_folder", "renderer", "write_file"]
