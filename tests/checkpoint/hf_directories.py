"""Small Hugging Face directories, with tokenizers as people publish them: of today, of long ago, and with further tokens."""

import io
import json
from pathlib import Path

import sentencepiece
import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "brown", "fox", "un", "##aff", "able", "The", "é"]
TEXT = ["the quick brown fox jumps over the lazy dog", "hello world, 1234; isn't it?", "def f(x): return x ** 2"] * 5
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


def write_files(folder: Path, **files: object) -> None:
    """Write files of JSON, or of text where the value is one; `__` in a name stands for the dot."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=3)  # unlike what we would write
        (folder / name.replace("__", ".")).write_text(text)


def write_model(folder: Path, kind: str, vocab: int, **settings: object) -> None:
    """Write a model with one layer, as transformers does.

    Args:
        folder: of Hugging Face.
        kind: `gpt2`, `llama` or `bert`.
        vocab: rows of its vocabulary.
        settings: further ones of its configuration.
    """
    import transformers

    torch.manual_seed(1)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    match kind:
        case "gpt2":
            config = transformers.GPT2Config(vocab_size=vocab, n_embd=16, n_layer=1, n_head=2, n_positions=32, **settings)
        case "llama":
            config = transformers.LlamaConfig(vocab_size=vocab, **sizes, **settings)
        case "bert":
            config = transformers.MegatronBertConfig(vocab_size=vocab, **sizes, **settings)
            transformers.MegatronBertForPreTraining(config).save_pretrained(folder)
            return
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def byte_vocabulary(folder: Path, more: tuple[str, ...] = ()) -> int:
    """Write GPT-2's vocab.json and merges.txt, of bytes and one merge; return the number of tokens."""
    from megatron.data.tokenizer import byte_symbols

    vocab = {symbol: number for number, symbol in enumerate([*byte_symbols(), "he", "<|endoftext|>", *more])}
    write_files(folder, vocab__json=vocab, merges__txt="#version: 0.2\nh e\n")
    return len(vocab)


def gpt2_added_tokens(folder: Path) -> None:
    """Write a GPT-2 with added_tokens.json and special_tokens_map.json, as before there was a tokenizer.json."""
    folder.mkdir()
    size = byte_vocabulary(folder)
    write_model(folder, "gpt2", size + 2, bos_token_id=257, eos_token_id=[257, size], pad_token_id=None)
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<pad>"}
    write_files(folder, added_tokens__json={"<pad>": size, "<sep>": size + 1}, special_tokens_map__json=roles)
    write_files(folder, tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer", "model_max_length": 32})
    settings = {"eos_token_id": [257, size], "do_sample": True, "temperature": 0.7, "transformers_version": "4.40.0"}
    write_files(folder, generation_config__json=settings)


def gpt2_decoder(folder: Path) -> None:
    """Write a GPT-2 with added_tokens_decoder, tokens that take the spaces beside them, and chat templates in own files."""
    folder.mkdir()
    size = byte_vocabulary(folder)
    write_model(folder, "gpt2", size + 3, bos_token_id=257, eos_token_id=size + 1)
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_files(
        folder,
        tokenizer_config__json={
            "add_prefix_space": True,
            "additional_special_tokens": ["<|start|>"],
            "bos_token": "<|endoftext|>",
            "eos_token": "<|end|>",
            "tokenizer_class": "GPT2Tokenizer",
            "added_tokens_decoder": {
                str(size): {**plain, "content": "<|start|>"},
                str(size + 1): {**plain, "content": "<|end|>", "rstrip": True},
                str(size + 2): {**plain, "content": "fox", "lstrip": True, "normalized": True, "special": False},
            },
        },
        chat_template__jinja=CHAT,
    )
    (folder / "additional_chat_templates").mkdir()
    write_files(folder / "additional_chat_templates", tool__jinja="{{ messages | length }}")


def llama_pad_beyond(folder: Path) -> None:
    """Write a Llama with a tokenizer.json, and a `<pad>` that tokenizer_config.json alone names: beyond the model's rows."""
    from megatron.data.tokenizer import ByteTokenizer

    folder.mkdir()
    write_model(folder, "llama", 257, bos_token_id=256, eos_token_id=256)
    ByteTokenizer().backend().save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    write_files(folder, tokenizer_config__json={"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT, **roles})


def llama_sentence_piece(folder: Path) -> None:
    """Write a Llama with a tokenizer.model alone."""
    folder.mkdir()
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=buffer, vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue()).get_piece_size()
    write_model(folder, "llama", size, bos_token_id=1, eos_token_id=2)


def bert_words(folder: Path) -> None:
    """Write a BERT with a vocab.txt alone, which transformers takes for one of small letters."""
    folder.mkdir()
    write_files(folder, vocab__txt="\n".join(WORDS) + "\n")
    write_model(folder, "bert", len(WORDS))


def bert_words_cased(folder: Path) -> None:
    """Write a BERT with a vocab.txt of small and capital letters."""
    bert_words(folder)
    write_files(folder, tokenizer_config__json={"do_lower_case": False})


SOURCES = (gpt2_added_tokens, gpt2_decoder, llama_pad_beyond, llama_sentence_piece, bert_words, bert_words_cased)
