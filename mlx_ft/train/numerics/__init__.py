"""The exact, fast training step: each optimization is proved equal at start-up before it is used.

Read in this order: `forward.py` splits a model into frozen prefix, trained top and head;
`losses.py` is the loss; `last_layer.py`, `packing.py`, `prefix_cache.py`, `prefix_store.py`,
`shared_start.py` and `recompute.py` save work and memory; `custom_vjp.py` has their gradients.
`packed_places.py` and `buckets.py` are how a GPU packs rows; `short_attention.py` computes what it
has no fused gradient for.
"""
