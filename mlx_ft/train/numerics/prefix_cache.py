"""Cache of the frozen layers' outputs, computed once per row.

Rows are computed in groups of similar length that depend on the split alone, so a resumed run finds
the same bits. Does not: know how the outputs are kept (`prefix_store.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlx_ft.data.tokens import TokenizedSplit, group_rows, pad_rows
from mlx_ft.recipe.train import PREFIX_GROUP_TOKENS
from mlx_ft.system.console import Progress
from mlx_ft.system.files import hash_of
from mlx_ft.train.numerics.batch import Batch
from mlx_ft.train.numerics.forward import Forward
from mlx_ft.train.numerics.packed_places import at_the_end
from mlx_ft.train.numerics.prefix_store import (
    DiskWriter,
    Layout,
    MemoryStore,
    Place,
    Store,
    find_on_disk,
    fits_on_disk,
    remove_damaged,
)
from mlx_ft.train.numerics.shared_start import SharedStart


def content_key(split: TokenizedSplit, computed_by: str) -> str:
    """Return the key of a split's prefix states: a hash of its ids, the grouping and `computed_by`.

    computed_by: model, frozen layers, shared start, versions and device.
    """
    ids = hashlib.sha256(split.ids.tobytes() + split.offsets.tobytes()).hexdigest()
    return hash_of([ids, PREFIX_GROUP_TOKENS, computed_by])[:32]


class PrefixCache:
    """Prefix states of the rows of one split.

    They are kept on the disk at `place`, when it is given and has room; else in memory up to
    `limit_bytes`. Other rows are computed each time. `name` is the split's in texts of progress.
    """

    def __init__(
        self,
        forward: Forward,
        split: TokenizedSplit,
        limit_bytes: int,
        start: SharedStart | None = None,
        place: Place | None = None,
        name: str = "rows",
    ) -> None:
        self._forward = forward
        self._start = start
        self._split = split
        self._place = place
        self._name = name
        self._row_tokens = split.lengths - 1
        self._memory = MemoryStore(limit_bytes)
        self._store: Store = self._memory
        self._filled = False

    @property
    def held_bytes(self) -> int:
        """Size of the states that are kept (bytes)."""
        return self._store.held_bytes

    @property
    def is_complete(self) -> bool:
        """Whether every row is kept, so that the frozen layers are not needed any more."""
        return all(row in self._store for row in range(len(self._split)))

    @property
    def shared_tokens(self) -> int | None:
        """Number of first tokens that all rows share and that predict no trained token.

        None where rows are padded instead of packed.
        """
        if not self._forward.packs:
            return None
        return 0 if self._start is None else self._start.unpredicting_tokens

    def _compute(self, rows: Sequence[int]) -> dict[int, mx.array]:
        """Return the states (T, hidden) of each row's tokens but the last, computed together."""
        contents = [self._split.row(row)[0][:-1] for row in rows]
        after = self._forward.prefix if self._start is None else self._start.rows
        together = after(mx.array(pad_rows(contents)))
        # Copies: a slice would hold the padding of its whole group.
        states = [mx.contiguous(together[index, : len(ids)]) for index, ids in enumerate(contents)]
        self._forward.evaluate(states)
        return dict(zip(rows, states, strict=True))

    def batch(self, batch: Batch) -> mx.array:
        """Return the prefix of a batch: (B, T, hidden), zero where it is padded; (1, T, hidden) of
        packed rows.
        """
        if self._forward.frozen_layers == 0:
            return mx.zeros((*batch.ids.shape, 0))
        missing = [row for row in batch.rows if row not in self._store]
        computed = self._compute(missing) if missing else {}
        states = [computed[row] if row in computed else self._store.get(row) for row in batch.rows]
        if batch.packing is None:
            width = batch.ids.shape[1]
            return mx.stack([mx.pad(s, [(0, width - s.shape[0]), (0, 0)]) for s in states])
        shared = batch.packing.shared
        together = mx.concatenate([states[0][:shared], *(s[shared:] for s in states)])[None]
        return at_the_end(together, batch.ids.shape[1])

    def fill(self, progress: Progress) -> None:
        """Compute every row that can be kept.

        Rows on the disk from an earlier run are not computed again, and a second call does nothing.
        progress: updated after each group of rows; its total is 1.
        """
        if self._filled or self._forward.frozen_layers == 0 or len(self._split) == 0:
            return
        if self._place is None or not self._fill_file(self._place, progress):
            self._fill_memory(progress)
        self._filled = True

    def _fill_file(self, place: Place, progress: Progress) -> bool:
        """Find or write the file, and return whether there is one now."""
        remove_damaged(place)
        found = find_on_disk(place, self._row_tokens)
        if found is None:
            try:
                self._write_file(place, progress)
            except OSError:  # a full or read-only disk costs the file, not the run
                return False
            found = find_on_disk(place, self._row_tokens)
        if found is not None:
            self._store = found
        return found is not None

    def _write_file(self, place: Place, progress: Progress) -> None:
        writer: DiskWriter | None = None
        try:
            for states in self._groups(progress):
                if writer is None:
                    example = next(iter(states.values()))
                    layout = Layout.of(self._row_tokens, example.shape[-1], example.dtype)
                    if not fits_on_disk(place.folder, layout.size_bytes):
                        return
                    writer = DiskWriter(place, layout)
                writer.put(states)
            assert writer is not None, "a split that is filled has rows"
            writer.finish()
        except BaseException:
            if writer is not None:
                writer.give_up()
            raise

    def _fill_memory(self, progress: Progress) -> None:
        for states in self._groups(progress):
            if not self._memory.put(states):
                return

    def _groups(self, progress: Progress) -> Iterator[dict[int, mx.array]]:
        """Yield the states of all rows, a group at a time."""
        done, rows = 0, len(self._split)
        for group in group_rows(self._split.lengths, PREFIX_GROUP_TOKENS):
            yield self._compute(group)
            done += len(group)
            progress.update(done / rows, f"frozen layers, {self._name}: {done} of {rows}")
