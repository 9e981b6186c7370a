"""Run folders of formulas, as the report's tests have them."""

from tests.report.conftest import done_run, make_run, planted_token

__all__ = ["done_run", "make_run", "planted_token"]
