"""GGUF files, unpacked once to bf16 safetensors beside the Hugging Face cache, since parsing one takes ten seconds."""

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from octavo.errors import ModelNotFoundError
from octavo.swiftkv.files import base_tensors


def unpacked_gguf(path: Path) -> Path:
    """Folder with the GGUF file's model in bf16 safetensors and its tokenizer; made on first use.

    Raises ModelNotFoundError.
    """
    try:
        stat = path.stat()
    except OSError as e:
        raise ModelNotFoundError(f"cannot read {path}: {e.strerror}") from e
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(HF_HOME) / "octavo" / key / path.stem
    if folder.is_dir():
        return folder
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        _unpack(path, aside)
        aside.rename(folder)
    except (OSError, SafetensorError) as e:
        if not folder.is_dir():  # else another process was faster
            raise ModelNotFoundError(
                f"cannot unpack {path} into {folder.parent}: {getattr(e, 'strerror', None) or e}; "
                "set HF_HOME to a folder that can be written"
            ) from e
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _unpack(path: Path, folder: Path) -> None:
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    try:  # newer transformers keep the blocks packed unless told otherwise
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, **options)
        tokenizer = _gguf_tokenizer(path)
    except Exception as e:  # gguf's reader raises whatever a broken file makes it meet
        raise ModelNotFoundError(f"cannot load model {path}: {str(e).splitlines()[0] if str(e) else type(e)}") from e
    finally:
        transformers_logging.set_verbosity(level)
    state = {k: v.bfloat16().contiguous() for k, v in base_tensors(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    config.dtype = torch.bfloat16
    config.name_or_path = path.stem
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gguf_tokenizer(path: Path) -> Any:
    """The tokenizer inside a GGUF file.

    Byte-level BPE is built here from the file's tokens and merges, because transformers before 5.17 or so takes it
    for a SentencePiece model and loses newlines; other kinds are left to transformers.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields

    def read(name: str) -> Any:
        field = fields.get(f"tokenizer.{name}")
        return None if field is None else field.contents()

    if read("ggml.model") != "gpt2":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens, kinds = read("ggml.tokens"), read("ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in read("ggml.merges")]
    bpe = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if read("ggml.pre") == "smollm"
        else [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == 3])
    named = {name: read(f"ggml.{name}_token_id") for name in ("bos", "eos", "padding", "unknown")}
    words = {name: tokens[i] for name, i in named.items() if i is not None}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=words.get("bos"),
        eos_token=words.get("eos"),
        pad_token=words.get("padding"),
        unk_token=words.get("unknown"),
        chat_template=read("chat_template"),
        clean_up_tokenization_spaces=False,
    )
