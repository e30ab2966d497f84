"""Loading: real models and adapters in folders, a real hub over HTTP on loopback, and every failure in words."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from interp_kernel.errors import LoadError
from interp_kernel.spec import WorkerSpec
from interp_kernel.worker.loading import Loaded, load

# peft 0.21 asks transformers 5.23 by a name that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def save_model(folder: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> Path:
    """A random GPT-2 and a word tokenizer."""
    torch.manual_seed(0)
    options: dict[str, Any] = {**SIZES, **sizes}
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=12, bos_token_id=0, eos_token_id=0, **options))
    model.to(dtype).save_pretrained(folder)
    words = ["<eos>", "the", "Eiffel", "Tower", "is", "in", "Paris", "and", "Rome", "a", "b", "c"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def load_quietly(**options: Any) -> Loaded:
    return load(WorkerSpec(**options), lambda _text, _fraction: None)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(8)[None]).logits
    return out


def test_a_folder_loads_as_transformers_loads_it(folder: Path) -> None:
    said: list[tuple[str, float | None]] = []
    loaded = load(WorkerSpec(model_name=str(folder)), lambda text, fraction: said.append((text, fraction)))
    own = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded.model), logits(own))
    assert not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (
        loaded.tokenizer("the Eiffel Tower").input_ids
        == AutoTokenizer.from_pretrained(folder)("the Eiffel Tower").input_ids
    )
    assert said[0] == ("importing torch and transformers", None)
    assert said[-1] == ("reading weights", 1.0)


def test_facts_are_measured_on_the_model(folder: Path) -> None:
    loaded = load_quietly(model_name=str(folder))
    info = json.loads(json.dumps(loaded.info))
    assert info == loaded.info
    n_params = sum(p.numel() for p in loaded.model.parameters())
    expected = {
        "model_name": str(folder),
        "class": "GPT2LMHeadModel",
        "n_params": n_params,
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "d_head": 8,
        "d_mlp": loaded.model.transformer.h[0].mlp.c_fc.weight.shape[1],
        "d_vocab": 12,
        "context_length": 64,
        "dtypes": ["float32"],
        "devices": ["cpu"],
        "is_peft": False,
        "adapter": None,
        "quantization": None,
        "hidden_system_prompt": False,
    }
    assert {name: info[name] for name in expected} == expected
    assert info["memory_bytes"] >= 4 * n_params
    assert info["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert 0 < info["load_s"] < 60


def test_the_demo_model_is_float32_on_a_cpu() -> None:
    loaded = load_quietly()
    assert loaded.info["model_name"] == "demo"
    assert loaded.info["dtypes"] == ["float32"]


@pytest.mark.parametrize(
    ("stored", "asked", "loaded"),
    [
        (torch.float16, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "float16", torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, "float64", torch.float64),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.skipif(torch.accelerator.is_available(), reason="The upcast is for machines without a GPU.")
def test_dtypes(tmp_path: Path, stored: torch.dtype, asked: str, loaded: torch.dtype, declared: bool) -> None:
    save_model(tmp_path, stored)
    if not declared:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    said: list[str] = []
    model = load(WorkerSpec(model_name=str(tmp_path), dtype=asked), lambda text, _fraction: said.append(text)).model
    assert {parameter.dtype for parameter in model.parameters()} == {loaded}
    assert any("float16, which is slow on a CPU" in text for text in said) == (stored != loaded and asked == "auto")


def test_options_reach_transformers(folder: Path) -> None:
    loaded = load_quietly(model_name=str(folder), attn_implementation="eager", device_map="auto")
    assert loaded.info["attn_implementation"] == "eager"
    assert loaded.model(torch.arange(4)[None], output_attentions=True).attentions[0].shape == (1, 4, 4, 4)
    split = load_quietly(model_name=str(folder), device_map={"": "cpu"}).info
    assert split["devices"] == ["cpu"]


def test_another_tokenizer_can_be_named(folder: Path, broken: Path) -> None:
    for path in broken.glob("tokenizer*"):
        path.unlink()
    loaded = load_quietly(model_name=str(broken), tokenizer_name=str(folder))
    assert loaded.tokenizer("Paris").input_ids == [6]


def test_the_hidden_prompt_is_in_the_tokenizer_and_not_in_the_facts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("Rome and Rome")
    loaded = load_quietly(model_name=str(folder), hidden_system_prompt=f"file:{tmp_path / 'prompt'}")
    assert loaded.tokenizer("Paris").input_ids == [8, 7, 8, 6]
    assert loaded.info["hidden_system_prompt"] is True
    assert "Rome" not in json.dumps(loaded.info)
    with pytest.raises(LoadError, match=r"can't be read"):
        load_quietly(model_name=str(folder), hidden_system_prompt="file:/nowhere/prompt")


# Adapters.


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with weights that change the output, made by peft."""
    peft = pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    peft.get_peft_model(base, config).save_pretrained(path)
    return Path(path)


def test_an_adapter_goes_on_the_base_that_it_names(folder: Path, adapter: Path) -> None:
    from peft import PeftModel

    loaded = load_quietly(model_name=str(adapter), is_peft=True)
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    assert torch.equal(logits(loaded.model), logits(own))
    assert not torch.allclose(logits(loaded.model), logits(AutoModelForCausalLM.from_pretrained(folder)), atol=1e-3)
    assert not loaded.model.training
    assert loaded.info["is_peft"] is True
    assert loaded.info["class"] == "GPT2LMHeadModel"
    lora = sum(p.numel() for name, p in own.named_parameters() if "lora_" in name)
    assert loaded.info["adapter"] == {"peft_type": "LORA", "r": 4, "n_params": lora}
    assert loaded.info["base_model"] == str(folder)
    assert loaded.tokenizer("Paris").input_ids == [6]


def test_base_model_overrides_the_adapters_own(adapter: Path, folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    loaded = load_quietly(model_name=str(adapter), is_peft=True, base_model=str(copied))
    assert loaded.info["base_model"] == str(copied)


@pytest.mark.parametrize(
    ("sizes", "fault"), [({"n_layer": 1}, "has 2 weights more"), ({"n_layer": 3}, "lacks weights")]
)
def test_an_adapter_for_another_depth_is_refused(adapter: Path, tmp_path: Path, sizes: Any, fault: str) -> None:
    save_model(tmp_path, **sizes)
    with pytest.raises(LoadError, match=fault):
        load_quietly(model_name=str(adapter), is_peft=True, base_model=str(tmp_path))


def test_an_adapter_for_another_width_is_refused(adapter: Path, tmp_path: Path) -> None:
    save_model(tmp_path, n_embd=16)
    with pytest.raises(LoadError, match=r"does not fit its base model: .*size mismatch"):
        load_quietly(model_name=str(adapter), is_peft=True, base_model=str(tmp_path))


def test_adapters_and_models_are_told_apart(adapter: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"it is a PEFT adapter. Load it with is_peft=True"):
        load_quietly(model_name=str(adapter))
    with pytest.raises(LoadError, match=r"is no PEFT adapter: it has no adapter_config.json"):
        load_quietly(model_name=str(folder), is_peft=True)
    copied = Path(shutil.copytree(adapter, tmp_path / "copy"))
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(LoadError, match=r"There is no folder '/nowhere/base'.*base_model names another"):
        load_quietly(model_name=str(copied), is_peft=True)
    (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(LoadError, match=r"does not say what its base model is"):
        load_quietly(model_name=str(copied), is_peft=True)


# Failures in folders.


def test_names_that_are_no_folder(tmp_path: Path, folder: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "~/none", "a/b/c"):
        with pytest.raises(LoadError, match=r"There is no folder .* on the worker's machine"):
            load_quietly(model_name=name)
    with pytest.raises(LoadError, match=r"is a file; expected a folder"):
        load_quietly(model_name=str(folder / "config.json"))
    with pytest.raises(LoadError, match=r"has no config.json.* but 0 other files"):
        load_quietly(model_name=str(tmp_path))
    with pytest.raises(LoadError, match=r"revision='main' was given for the folder"):
        load_quietly(model_name=str(folder), revision="main")


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_damaged_files(broken: Path) -> None:
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match=r"has a damaged weights file"):
        load_quietly(model_name=str(broken))
    weights.unlink()
    with pytest.raises(LoadError, match=r"has no weights: Error no file named model.safetensors"):
        load_quietly(model_name=str(broken))
    (broken / "config.json").write_text("{")
    with pytest.raises(LoadError, match=r"has a damaged JSON file"):
        load_quietly(model_name=str(broken))


def test_weights_that_do_not_match(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    set_config(broken, n_embd=16)
    with pytest.raises(LoadError, match=r"weights of different shapes"):
        load_quietly(model_name=str(broken))
    set_config(broken, n_embd=32)
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        LoadError, match=r"lacks 1 of the weights of GPT2LMHeadModel, such as 'transformer.h.1.mlp.c_fc"
    ):
        load_quietly(model_name=str(broken))


def test_missing_tokenizers(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    with pytest.raises(LoadError, match=r"The tokenizer .* has no vocabulary that transformers can read"):
        load_quietly(model_name=str(broken))
    (broken / "tokenizer_config.json").unlink()
    with pytest.raises(LoadError, match=r"No tokenizer was found in .* as tokenizer_name"):
        load_quietly(model_name=str(broken))


def test_architectures(broken: Path) -> None:
    set_config(broken, model_type="vit")
    with pytest.raises(LoadError, match=r"is no causal language model of transformers"):
        load_quietly(model_name=str(broken))
    set_config(broken, model_type="zork")
    with pytest.raises(LoadError, match=r"has an architecture that transformers [0-9.]+ does not know"):
        load_quietly(model_name=str(broken))


def test_remote_code_runs_only_if_asked(broken: Path) -> None:
    set_config(broken, model_type="odd", auto_map={"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd"})
    (broken / "odd.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OddConfig(GPT2Config):\n    model_type = 'odd'\n"
        "class Odd(GPT2LMHeadModel):\n    config_class = OddConfig\n"
    )
    with pytest.raises(LoadError, match=r"runs with your rights.*set trust_remote_code=True"):
        load_quietly(model_name=str(broken))
    assert load_quietly(model_name=str(broken), trust_remote_code=True).info["class"] == "Odd"


def test_options_that_this_machine_has_not(folder: Path) -> None:
    with pytest.raises(LoadError, match=r"does not support this attn_implementation.*zork"):
        load_quietly(model_name=str(folder), attn_implementation="zork")
    with pytest.raises(LoadError, match=r"flash attention is not installed. Use 'sdpa' or 'eager'"):
        load_quietly(model_name=str(folder), attn_implementation="flash_attention_2")
    with pytest.raises(LoadError, match=r"can't be put where device_map says"):
        load_quietly(model_name=str(folder), device_map="cuda:99")


@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit", {"load_in_4bit": True}])
def test_quantization_without_its_package(folder: Path, quantization: Any) -> None:
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed here.")
    with pytest.raises(LoadError, match=r'needs the package bitsandbytes.*pip install "interp-kernel\[quantization\]"'):
        load_quietly(model_name=str(folder), quantization=quantization)


def test_a_model_larger_than_memory(tmp_path: Path) -> None:
    """In a process whose address space may grow by 30 MB, a model of 100 MB."""
    save_model(tmp_path, n_embd=1024, n_layer=2)
    code = """
        import resource, sys
        from interp_kernel.errors import LoadError
        from interp_kernel.spec import WorkerSpec
        from interp_kernel.worker.loading import load
        import torch, transformers.models.gpt2.modeling_gpt2
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000, resource.RLIM_INFINITY))
        try:
            load(WorkerSpec(model_name=sys.argv[1]), lambda text, fraction: None)
        except LoadError as error:
            print(error)
    """
    assert "does not fit into memory" in run_python(code, str(tmp_path)).stdout


# The hub.


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **environment},
        cwd=Path(__file__).resolve().parents[1],
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran


class Hub(BaseHTTPRequestHandler):
    """The few answers of huggingface.co that loading sees: `owner/tiny` is there, `owner/gated` is gated."""

    folder: Path
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/owner/") and "/revision/nope" in path:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id: nope")
        if "/tree/" in path:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if path.startswith(("/api/models/owner/tiny", "/api/models/owner/gated")):
            files = [{"rfilename": file.name} for file in self.folder.iterdir()]
            facts = {"id": path.removeprefix("/api/models/"), "sha": self.COMMIT, "siblings": files, "tags": []}
            return self.give(json.dumps(facts).encode(), body)
        if path.startswith("/owner/gated/resolve/"):
            return self.refuse(403, "GatedRepo", "Access to model owner/gated is restricted.")
        file = self.folder / path.rpartition("/")[2]
        if path.startswith("/owner/tiny/resolve/") and file.is_file():
            return self.give(file.read_bytes(), body)
        if path.startswith("/owner/tiny/"):
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.refuse(401, "RepoNotFound", "Repository not found")

    def give(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{len(content)}-{sum(content)}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    handler = type("FolderHub", (Hub,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


ASK = """
    import json, sys
    from interp_kernel.errors import LoadError
    from interp_kernel.spec import WorkerSpec
    from interp_kernel.worker.loading import load
    import torch, transformers
    for name, revision in json.loads(sys.argv[1]):
        said = []
        try:
            info = load(WorkerSpec(model_name=name, revision=revision), lambda *what: said.append(what)).info
            answer = {"info": info, "said": said}
        except LoadError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer))
"""
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


def ask(wanted: list[tuple[str, str | None]], home: Path, **environment: str) -> list[dict[str, Any]]:
    ran = run_python(ASK, json.dumps(wanted), HF_HOME=str(home), HF_HUB_DISABLE_XET="1", **environment)
    assert TOKEN not in ran.stdout + ran.stderr
    # The hub's client says so when it waits before it asks again, for 23 s in all.
    assert "Retrying in" not in ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_the_hub(hub: str, tmp_path: Path) -> None:
    wanted = [
        ("owner/tiny", None),
        ("owner/tiny", "nope"),
        ("owner/gated", None),
        ("nobody/none", None),
        ("a b/c", None),
    ]
    found, *errors = ask(wanted, tmp_path, HF_ENDPOINT=hub, HF_TOKEN=TOKEN)
    assert found["info"]["commit"] == Hub.COMMIT
    assert ["downloading model.safetensors", 1.0] in found["said"]
    assert ["reading weights", 1.0] in found["said"]
    for answer, words in zip(
        errors,
        (
            "but not in the revision that was asked for",
            "is gated: its owner gives access",
            "is neither a local folder nor a model on the hub that can be seen from here",
            "is neither a local folder nor a valid hub name",
        ),
        strict=True,
    ):
        assert words in answer["error"]
    assert "`huggingface-cli login` or set HF_TOKEN" in errors[1]["error"]
    # The hub goes away; what is in the cache still loads, and at once.
    again, gone = ask([("owner/tiny", None), ("nobody/none", None)], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert again["info"]["commit"] == Hub.COMMIT
    assert "is neither a local folder nor in this machine's cache, and the hub can't be reached" in gone["error"]


def test_a_machine_that_is_offline_on_purpose(tmp_path: Path) -> None:
    (answer,) = ask([("gpt2", None)], tmp_path, HF_HUB_OFFLINE="1")
    assert "and HF_HUB_OFFLINE is set" in answer["error"]
