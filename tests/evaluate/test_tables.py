"""The tables say what the results say, in the results' order."""

from mlx_ft.evaluate.stats import summarise
from mlx_ft.evaluate.tables import result_tables


def row(category: str, score: float, failure: str | None = None) -> dict[str, object]:
    return {"category": category, "score": score, "failure": failure, "weight": 1.0}


def test_a_table_has_categories_total_and_failures_for_each_model() -> None:
    base = summarise([row("read", 0.0, "prose"), row("read", 0.0, "prose"), row("grep", 1.0)])
    tuned = summarise([row("read", 1.0), row("read", 0.5, "wrong_wrapper"), row("grep", 1.0)])
    text = result_tables({"suites": {"code": {"base": base, "quantized": tuned}, "none": {}}})
    lines = [line.split("  ") for line in text.splitlines()]
    cells = {words[0]: [word.strip() for word in words[1:] if word.strip()] for words in lines}
    assert next(iter(cells)) == "code (n = 3)"
    assert cells["code (n = 3)"] == ["base", "quantized"]
    assert cells["read"][1].startswith("0.75 [") and cells["grep"][0].startswith("1.00 [")
    assert cells["total"] == [
        f"{each['mean']:.2f} [{each['low']:.2f}, {each['high']:.2f}]" for each in (base, tuned)
    ]
    assert cells["passed"] == ["1 of 3", "2 of 3"]
    assert cells["prose"] == ["2", "0"] and cells["wrong_wrapper"] == ["0", "1"]
    order = [words[0] for words in lines if words[0] in cells]
    assert order[-5:] == ["grep", "total", "passed", "prose", "wrong_wrapper"]
