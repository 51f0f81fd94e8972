"""Loading a model with its tokenizer: hub id, folder, GGUF file, published checkpoint or the embedded default."""

from octavo.models.export import save_published
from octavo.models.load import default_dtype, default_model, find_adapters, load, load_plain, load_tokenizer

__all__ = ["default_dtype", "default_model", "find_adapters", "load", "load_plain", "load_tokenizer", "save_published"]
