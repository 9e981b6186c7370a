"""Use a finished model: chat, server, LM Studio, Ollama, Hugging Face Hub.

Read in this order: `chat.py`; `serve.py` and `server_process.py`; `lm_studio.py`; `ollama.py` and
`ollama_template.py`; `huggingface.py` and `model_card.py`; `mlx_lm_adapter.py`.
"""
