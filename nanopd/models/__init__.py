"""Decoder models: Qwen2, Qwen3 and Llama, read from Hugging Face checkpoints."""
