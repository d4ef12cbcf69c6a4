"""Models by directory, GGUF file and hub name, and everything that is refused with a clear sentence."""

from __future__ import annotations

import json

import pytest
import torch

from autotune.errors import UnsupportedModelError
from autotune.model.load import _tokenizer, load
from tests import models


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def write_gguf(file, model):
    """A Llama as llama.cpp stores it: other names, and the rows of Q and K in pairs."""
    gguf = pytest.importorskip("gguf")
    config, heads = model.config, {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    vocabulary = models.tiny_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get)[:-1], "ab"]  # the one merge
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(models.BOS)
    writer.add_eos_token_id(models.EOS)
    for name, tensor in model.state_dict().items():
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        for part, count in heads.items():
            if f"attn_{part}." in name:
                size = tensor.shape[0] // count // 2
                tensor = tensor.view(count, 2, size, -1).transpose(1, 2).reshape(tensor.shape)
        if name != "lm_head.weight":  # tied
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def test_a_gguf_file_is_converted_once(tmp_path, llama, monkeypatch):
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", llama)
    model, tokenizer = load(tmp_path / "tiny.gguf")
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(model(ids).logits, llama(ids).logits)
    assert not hasattr(model.config, "quantization_config")
    assert len(tokenizer("abab")["input_ids"]) == 2

    def again(*_):
        pytest.fail("converted a second time")

    with monkeypatch.context() as patch:
        patch.setattr("autotune.model.gguf._convert", again)
        load(tmp_path / "tiny.gguf")
    (weights,) = (tmp_path / "cache").glob("models/*/tiny/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])  # as a full disk or a crash leaves it
    healed, _ = load(tmp_path / "tiny.gguf")
    torch.testing.assert_close(healed(ids).logits, llama(ids).logits)


@pytest.mark.parametrize("name", ["..gguf", "....gguf", "a b.gguf", "\x1b[31m.gguf"])
def test_a_gguf_file_of_any_name_stays_in_its_folder(name, tmp_path, llama, monkeypatch):
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    other = tmp_path / "cache" / "models" / "other"
    other.mkdir(parents=True, mode=0o700)
    write_gguf(tmp_path / name, llama)
    load(tmp_path / name)
    assert sorted(len(p.name) for p in (tmp_path / "cache" / "models").iterdir()) == [5, 16]


def test_a_gguf_file_without_all_weights_is_refused(tmp_path, llama, monkeypatch):
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    whole = llama.state_dict
    monkeypatch.setattr(llama, "state_dict", lambda: {k: v for k, v in whole().items() if "down_proj" not in k})
    write_gguf(tmp_path / "tiny.gguf", llama)
    with pytest.raises(UnsupportedModelError, match=r"tiny\.gguf lacks 2 of the weights"):
        load(tmp_path / "tiny.gguf")


def test_a_directory(tmp_path, llama, tokenizer):
    model, found = load(save(tmp_path / "m", llama, tokenizer))
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, llama(ids).logits)
    assert not model.training
    assert found("ab")["input_ids"] == tokenizer("ab")["input_ids"]


def test_without_tokenizer_files_there_is_no_tokenizer(tmp_path, llama):
    assert load(save(tmp_path, llama))[1] is None


def test_a_hub_models_tokenizer_that_cannot_be_loaded_is_a_warning(monkeypatch, tmp_path, llama, caplog):
    """As where the package that it needs is missing."""
    import transformers

    def fails(*_args, **_options):
        raise ImportError("it requires the SentencePiece library")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    assert _tokenizer("nobody/a-model", {}) is None
    assert "ImportError: it requires the SentencePiece library" in caplog.text
    caplog.clear()
    assert load(save(tmp_path, llama))[1] is None
    assert not caplog.text


def test_dtype_is_as_asked(tmp_path, llama):
    assert load(save(tmp_path, llama), dtype=torch.bfloat16)[0].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/such/model/anywhere", "no file or directory"),
        ("./missing", "no file or directory"),
        ("missing.gguf", "no file or directory"),
        ("", "no config.json"),
        ("nobody/no-such-model", "hub cannot be reached"),
    ],
)
def test_a_name_that_leads_nowhere(name, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnsupportedModelError, match=said):
        load(name)


def test_a_directory_with_only_a_gguf_file_names_it(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match=r"x\.gguf"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("make", "said"), [(models.tiny_t5, "encoder-decoder"), (models.tiny_bert, "does not generate")], ids=["t5", "bert"]
)
def test_what_is_no_causal_lm_is_refused(make, said, tmp_path):
    with pytest.raises(UnsupportedModelError, match=said):
        load(save(tmp_path, make()))


@pytest.mark.fault("F78")
def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    ran = tmp_path / "ran"
    config = {"model_type": "homemade", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    with pytest.raises(UnsupportedModelError, match="not run here"):
        load(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", "{"), ("config.json", '"text"'), ("model.safetensors", "nonsense"), ("model.safetensors", None)],
)
def test_damaged_files_are_one_clear_error(file, content, tmp_path, llama):
    save(tmp_path, llama)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(UnsupportedModelError, match=str(tmp_path)):
        load(tmp_path)


def test_a_gguf_that_is_none(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(UnsupportedModelError, match="cannot be read as a GGUF"):
        load(tmp_path / "bad.gguf")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_gguf_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match="pip install gguf"):
        load(tmp_path / "m.gguf")
