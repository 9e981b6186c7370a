"""Tables of evidence have a column only for what is known of some row."""

from mlx_ft.report.evidence import column_table


def test_the_model_is_named_where_a_column_says_which_it_is() -> None:
    found = column_table({"base": {"template": "same"}, "peer": {"model": "m", "template": "same"}})
    assert found is not None
    assert [cell.text for cell in found.head] == ["column", "chat format", "model"]
    assert sorted(row[2].text for row in found.rows) == ["", "model m"]


def test_a_column_of_empty_cells_is_left_out() -> None:
    found = column_table({"base": {"template": "same"}, "adapter": {"template": "mismatch"}})
    assert found is not None
    assert [cell.text for cell in found.head] == ["column", "chat format"]
    assert {len(row) for row in found.rows} == {2}
    assert [row[1].tone for row in found.rows] != ["", ""], "a mismatch keeps its colour"
