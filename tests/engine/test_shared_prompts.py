"""A start is what its prompts begin with, saves what it must, and leaves them a token."""

from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.engine.shared_prompts import MIN_SAVED_TOKENS, shared_starts

TOKENS = st.integers(0, 2)
PROMPTS = st.lists(
    st.builds(
        lambda system, question: [9] * system + question,
        st.sampled_from([0, 30, 90, 200]),
        st.lists(TOKENS, min_size=1, max_size=12),
    ),
    max_size=12,
)


@given(PROMPTS)
def test_a_start_is_what_its_prompts_begin_with(prompts: list[list[int]]) -> None:
    starts, own = shared_starts(prompts)
    assert len(own) == len(prompts)
    for prompt, number in zip(prompts, own, strict=True):
        if number is not None:
            ids = starts[number].ids
            assert tuple(prompt[: len(ids)]) == ids and len(ids) < len(prompt)
    for number, start in enumerate(starts):
        known = () if start.parent is None else starts[start.parent].ids
        assert start.parent is None or start.parent < number
        assert start.ids[: len(known)] == known and len(known) < len(start.ids)
        users = sum(tuple(prompt[: len(start.ids)]) == start.ids for prompt in prompts)
        assert (users - 1) * (len(start.ids) - len(known)) >= MIN_SAVED_TOKENS


@given(PROMPTS)
def test_no_start_is_overlooked_that_all_prompts_have(prompts: list[list[int]]) -> None:
    starts, own = shared_starts(prompts)
    common = 0
    while prompts and all(
        len(prompt) > common + 1 and prompt[common] == prompts[0][common] for prompt in prompts
    ):
        common += 1
    if (len(prompts) - 1) * common >= MIN_SAVED_TOKENS:
        assert starts and None not in own
        assert all(len(starts[number].ids) >= common for number in own if number is not None)


def test_starts_within_starts() -> None:
    """One system prompt, two sets of tools, four questions each, and a question of its own."""
    system, tools = [1] * 40, ([2] * 30, [3] * 30)
    prompts = [[*system, *block, 4, number] for block in tools for number in range(4)]
    starts, own = shared_starts([*prompts, [8, 8]])
    assert [len(start.ids) for start in starts] == [40, 71, 71]
    assert [start.parent for start in starts] == [None, 0, 0]
    assert own == (1, 1, 1, 1, 2, 2, 2, 2, None)
    assert shared_starts([]) == ((), ())
    assert shared_starts([[1, 2]]) == ((), (None,))
