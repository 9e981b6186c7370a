"""The same questions to several models, scored and compared.

Read in this order: `stage.py` (a run's evaluation) and `measure.py` (any models) are the entries;
`suites.py` and `suite_keys.py` read what is asked; `column.py` has the vocabulary, `targets.py`,
`local_model.py` and `endpoint.py` the models that answer; `harness.py` asks and logs, with
`sample_log.py`, `answer_cache.py` and `chat_fingerprint.py`; `scorers/` judges one answer and
`signs.py` its degeneration; `stats.py`, `paired_stats.py` and `gates.py` judge all of them;
`checkpoint_prompts.py`, `probe.py`, `lm_eval.py` and `lm_eval_model.py` are other uses.
"""
