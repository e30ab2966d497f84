"""Interpretability techniques: plain functions of `(model, tokenizer, ...)` on plain Hugging Face models.

Each public file holds the techniques of one family. A technique returns JSON-able data (finite numbers, one row
per thing, tokens and units named) and leaves the model as it found it; `plots` draws such results without a model.
No file here imports `interp_kernel`, so that a technique runs wherever torch and transformers do.
"""
