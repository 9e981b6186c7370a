"""The exact, fast training step: each optimization is proved equal at start-up before it is used.

Read in this order: `forward.py` splits a model into frozen prefix, trained top and head;
`batch.py` puts rows together; `losses.py` is the loss; `last_layer.py`, `packing.py`,
`prefix_cache.py`, `prefix_store.py`, `shared_start.py` and `recompute.py` save work and memory;
`custom_vjp.py` has their gradients. A GPU's way: `buckets.py` and `packed_places.py` lay rows out
in few sizes, `trained_weights.py` and `flat_adapter.py` make an adapter one vector, and
`short_attention.py` computes what has no fused gradient.
"""
