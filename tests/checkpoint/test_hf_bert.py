"""A BERT's exported directory: it opens in every class of transformers' page on MegatronBert, and gives the same logits."""

import json
from dataclasses import replace

import pytest
import torch
from models import BERT, build, list_family, max_difference, save_model, with_rows
from ranks import on_ranks
from safetensors.torch import load_file

from megatron.checkpoint.find import find_checkpoint
from megatron.config.schema import ModelConfig, TokenizerConfig
from megatron.data.tokenizer import build_tokenizer
from megatron.inference.restore import open_model
from megatron.interop.checked_export import ExportError, export_hf
from megatron.interop.compare_logits import bert_logits
from megatron.interop.families.megatron_bert import MEGATRON_BERT
from megatron.interop.hf_export import export_weights
from megatron.interop.tensor_mapping import SAME, split_qkv
from megatron.mesh.mesh import Axis
from megatron.model.bert import Bert

transformers = pytest.importorskip("transformers")

CASES = {
    "bert": BERT,
    "without binary head": {**BERT, "bert_binary_head": False},
    "without biases, exact gelu, 1p": {
        **BERT,
        "add_bias_linear": False,
        "activation": "gelu-exact",
        "apply_layernorm_1p": True,
    },
    "without binary head, norm biases, positions": {
        **BERT,
        "bert_binary_head": False,
        "add_norm_bias": False,
        "position_embedding_type": "none",
    },
}


def save_small_model(root, settings, tp=1, dtype=torch.float32, tokenizer=None):
    arguments = (str(root), settings, tp, dtype, tokenizer)
    on_ranks(tp, save_model, *arguments) if tp > 1 else save_model(*arguments)
    return root


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_that_was_saved(tmp_path, case):
    """Saved with tp 2; compared with the model itself, not with what was read back. Rows of several lengths, two segments."""
    config = ModelConfig(**CASES[case])
    save_small_model(tmp_path / "run", CASES[case], 2)
    export_weights(find_checkpoint(tmp_path / "run"), tmp_path / "hf")
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    name = "MegatronBertForPreTraining" if config.bert_binary_head else "MegatronBertForMaskedLM"
    assert about["architectures"] == [name] and about["tie_word_embeddings"] is True and about["vocab_size"] == 127
    assert load_file(tmp_path / "hf" / "model.safetensors")["bert.embeddings.word_embeddings.weight"].shape == (127, 32)
    auto = transformers.AutoModelForPreTraining if config.bert_binary_head else transformers.AutoModelForMaskedLM
    theirs, info = auto.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(theirs).__name__ == name
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = build(config, Axis.alone("tp")).eval()
    assert isinstance(ours, Bert)
    tokens = torch.arange(3 * 40).reshape(3, 40) * 5 % 127
    found = [max_difference(*pair) for pair in bert_logits(ours, theirs.eval(), tokens, torch.tensor([40, 31, 12]))]
    assert len(found) == (2 if config.bert_binary_head else 1) and max(found) < 1e-4
    whole = bert_logits(ours, theirs, tokens, torch.tensor([40, 40, 40]))  # without padding nothing is masked
    assert max(max_difference(*pair) for pair in whole) < 1e-4
    theirs.bert.embeddings.token_type_embeddings.weight.data[1, 0] += 1.0  # the comparison has tokens of both types
    other = bert_logits(ours, theirs, tokens, torch.tensor([40, 31, 12]))
    assert (max(max_difference(*pair) for pair in other) > 1e-2) == config.bert_binary_head


# Every class of the page, and the weights that it has and pretraining has not: those of a new head.
CLASSES = {
    "MegatronBertModel": set(),
    "MegatronBertForMaskedLM": set(),
    "MegatronBertForCausalLM": set(),
    "MegatronBertForNextSentencePrediction": set(),
    "MegatronBertForPreTraining": set(),
    "MegatronBertForSequenceClassification": {"classifier.weight", "classifier.bias"},
    "MegatronBertForMultipleChoice": {"classifier.weight", "classifier.bias"},
    "MegatronBertForTokenClassification": {"classifier.weight", "classifier.bias"},
    "MegatronBertForQuestionAnswering": {"qa_outputs.weight", "qa_outputs.bias"},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    save_small_model(folder / "run", BERT)
    export_weights(find_checkpoint(folder / "run"), folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_opens_it(exported, name):
    extra = {"is_decoder": True} if name == "MegatronBertForCausalLM" else {}
    model, info = getattr(transformers, name).from_pretrained(exported, output_loading_info=True, **extra)
    assert set(info["missing_keys"]) == CLASSES[name] and not info["mismatched_keys"]
    held = load_file(exported / "model.safetensors")
    mine = {k.removeprefix("bert."): v for k, v in model.state_dict().items()}
    shared = [k for k in held if k.removeprefix("bert.") in mine]
    assert len(shared) > 36 and all(torch.equal(mine[k.removeprefix("bert.")], held[k]) for k in shared)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,;'+*12()=", "the", "quick", "##ing"]
    words += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(words) + "\n")
    return build_tokenizer(TokenizerConfig(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(path)))


@pytest.mark.parametrize("binary", [True, False])
def test_the_export_proves_itself(tmp_path, tokenizer, binary):
    said = []
    settings = {**BERT, "vocab_size": tokenizer.vocab_size, "bert_binary_head": binary}
    save_small_model(tmp_path / "run", settings, tokenizer=tokenizer)
    export_hf(tmp_path / "run", tmp_path / "hf", say=said.append)
    assert any("logits differ by at most" in line for line in said)
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert about["pad_token_id"] == tokenizer.token("pad") == 0 and about["type_vocab_size"] == 2
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert words("the quick", "mask")["input_ids"][0] == tokenizer.token("cls") and words.mask_token == "[MASK]"
    # What the model is told of a pair: which token is of which text, where the model was trained on pairs.
    told = words("the quick", "mask").get("token_type_ids")
    assert told == ([0] * 4 + [1] * 5 if binary else None)
    opened = open_model(tmp_path / "run")
    assert isinstance(opened.model, Bert) and opened.config.architecture == "bert"


def test_half_precision_is_proved_exactly(tmp_path):
    save_small_model(tmp_path / "run", BERT)
    export_hf(tmp_path / "run", tmp_path / "hf", dtype=torch.bfloat16, say=lambda line: None)
    assert {t.dtype for t in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}


def swapped_queries(tensor, config):
    q, k, v = split_qkv(tensor, config)
    return k, q, v


@pytest.mark.parametrize(
    "wrong", ["pooler.weight", "order.bias", "masked_words.dense.weight", "layers.{n}.attention.qkv.weight"]
)
def test_wrong_weights_fail_the_proof(tmp_path, monkeypatch, wrong):
    """Shapes fit, transformers opens it, and only the logits tell; those of the binary head for what it alone uses."""
    save_small_model(tmp_path / "run", BERT)
    conversion = replace(SAME, to_hf=lambda tensor, config: (-tensor,))
    if "qkv" in wrong:
        conversion = replace(SAME, to_hf=swapped_queries)
    rows = tuple(
        replace(row, conversion=conversion) if row.native == wrong else row for row in MEGATRON_BERT.classes[0].templates
    )
    monkeypatch.setattr("megatron.interop.checked_export._round_weights", lambda model, family, written: None)
    list_family(monkeypatch, with_rows(MEGATRON_BERT, rows))
    with pytest.raises(ExportError, match=r"the logits differ by .*, more than 0.0001. The written files are in .*hf.failed"):
        export_hf(tmp_path / "run", tmp_path / "hf", say=lambda line: None)
